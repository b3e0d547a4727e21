"""Emitted files stand alone, say what they are for, and compute what their reference does."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import hot_models
import pytest
import torch
from building import Builder
from checking import check_golden, run_pass

from redpass.codegen import ops as kernels_of
from redpass.codegen.bundle import ALLOWED, UnbundledError, bundle
from redpass.codegen.emit import Emitted, emit
from redpass.codegen.folder import write_kernels
from redpass.codegen.lower import LowerHotPaths
from redpass.codegen.ops import add_norm
from redpass.codegen.tuning import Device, Records, Shape, Timing

aten = torch.ops.aten
GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="module")
def files() -> dict[str, Emitted]:
    found, skips = emit(hot_models.paths(), origin="redpass, from a test")
    assert not skips
    return {file.name: file for file in found}


def test_one_file_a_distinct_path(files: dict[str, Emitted]) -> None:
    assert {name: len(file.places) for name, file in files.items()} == {
        "gated_feed_forward": 1,
        "low_rank_linear": 1,
        "add_norm_1": 1,
        "add_norm_2": 1,
    }


def test_equal_layers_share_a_file() -> None:
    found, _ = emit(hot_models.llama())
    assert {file.op: len(file.places) for file in found} == {
        "gated_feed_forward": 2,
        "rotary": 2,
        "add_norm": 4,
    }


@pytest.mark.parametrize(
    "name", ["gated_feed_forward", "low_rank_linear", "add_norm_1", "add_norm_2"]
)
def test_sources_are_as_they_were(
    name: str, files: dict[str, Emitted], request: pytest.FixtureRequest
) -> None:
    update = request.config.getoption("--update-golden")
    check_golden(name, files[name].source, update, GOLDEN)


def test_the_tail_is_in_the_kernel_and_in_the_reference(files: dict[str, Emitted]) -> None:
    """`gelu(normed * 0.5) + skip` after the second norm."""
    file = files["add_norm_2"]
    assert [operand.name for operand in file.operands if operand.is_tail] == ["tail_0"]
    assert "tail_0_value = tl.load(tail_0 + row * width + column, mask=inside" in file.source
    assert "tl.erf(" in file.source
    assert file.tail[-1] == "last = torch.ops.aten.add.Tensor(tail_gelu, tail_0)"
    assert not files["add_norm_1"].tail


def imports(source: str) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add((node.module or "").split(".")[0])
    return found


def test_files_import_torch_and_triton_only(files: dict[str, Emitted]) -> None:
    standard = {"collections", "functools", "math", "typing", "dataclasses"}
    for file in files.values():
        assert imports(file.source) - standard == {"torch", "triton"}


@pytest.mark.parametrize("op", sorted(kernels_of.OPS))
def test_every_op_fits_into_one_file(op: str) -> None:
    record = kernels_of.OPS[op]
    found = bundle((record.reference.__module__, f"{record.launch.__module__}.kernel"))
    text = "\n".join([*found.imports, *(part for _, part in found.parts)])
    assert imports(text) <= ALLOWED
    names = [n.name for n in ast.parse(text).body if isinstance(n, ast.FunctionDef)]
    assert len(names) == len(set(names))
    assert {"launch", record.reference.__name__} <= set(names)


def test_emitted_tests_hold_in_the_interpreter(files: dict[str, Emitted], tmp_path: Path) -> None:
    """Run as a user would, in a process of its own; a kernel that is wrong fails its test."""
    write_kernels(tmp_path, list(files.values()), ())
    good = files["add_norm_1"]
    wrong = good.source.replace("tl.sum(y * y, axis=1) / width", "tl.sum(y * y, axis=1)")
    assert wrong != good.source
    (tmp_path / "kernels/wrong.py").write_text(wrong)
    test = good.test.replace("import add_norm_1 as", "import wrong as")
    (tmp_path / "kernels/test_wrong.py").write_text(test)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "kernels"]
    without = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "TRITON_INTERPRET")}
    done = subprocess.run(command, cwd=tmp_path, env=without, capture_output=True, text=True)
    failed = [line for line in done.stdout.split("\n") if line.startswith("FAILED")]
    assert len(failed) == 3, done.stdout[-4000:] + done.stderr[-1000:]
    assert all("test_wrong.py::test_the_kernel" in line for line in failed)
    assert "17 passed" in done.stdout


def test_ops_that_stand_in_the_graph_are_emitted() -> None:
    before, _ = emit(hot_models.paths())
    after = run_pass(LowerHotPaths(kernels="triton"), hot_models.paths()).after
    found, _ = emit(after)
    assert {file.op for file in found} == {file.op for file in before}
    tails = [sorted(file.tail for file in files) for files in (before, found)]
    assert tails[0] == tails[1]


def test_a_model_without_hot_paths_gives_no_files() -> None:
    b = Builder()
    assert emit(b.program(b.call(aten.relu.default, b.input("x", "batch", 3)))) == ((), ())


def test_tuned_options_are_written() -> None:
    program = hot_models.paths()
    card = Device("NVIDIA H100 80GB HBM3", "580.1")
    x = torch.empty(4, 8, 24, device="meta")
    weight = torch.empty(24, device="meta")
    shape = Shape.of(add_norm.OP, (x, x, weight, None, 1e-6, "rms")).bucket
    options = {"BLOCK": 32, "ROWS": 4, "num_warps": 2, "num_stages": 1}
    records = Records(card, {shape: Timing(shape, options, 1.0, "torch.compile", 2.0)})
    found = {file.name: file.source for file in emit(program, records=records)[0]}
    assert "'ROWS': 4, 'num_warps': 2" in found["add_norm_1"]
    assert "'ROWS': 4, 'num_warps': 2" not in found["add_norm_2"]


def options_of(file: Emitted) -> Any:
    tree = ast.parse(file.source)
    (found,) = [
        node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "OPTIONS"
    ]
    return ast.literal_eval(found)


def test_where_pytorch_is_as_fast_the_reference_runs(files: dict[str, Emitted]) -> None:
    tables = options_of(files["low_rank_linear"])
    assert all(table[-1] == (None, None) for table in tables.values())
    assert all(table[-2][0] == 16 * 24 for table in tables.values()), "up to 16 rows"
    assert "return reference(x, down, up, bias)" in files["low_rank_linear"].source


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ({"one": "import numpy\n"}, "one imports numpy"),
        ({"one": "def f(): ...\n", "two": "f = 1\n"}, "two and one both define f"),
        ({"one": "from redpass.ops import is_call as c\n"}, "one renames what it imports"),
        ({}, "there is no module one"),
    ],
)
def test_modules_that_cannot_stand_in_one_file(
    sources: dict[str, str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spec(name: str) -> Any:
        path = tmp_path / f"{name}.py"
        path.write_text(sources.get(name, ""))
        return SimpleNamespace(origin=path) if name in sources else None

    monkeypatch.setattr("redpass.codegen.bundle.importlib.util.find_spec", spec)
    with pytest.raises(UnbundledError, match=message):
        bundle(["one", "two"])
