"""`.pt2` files: loaded without redpass, at other sizes, under the public names."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import redpass
from redpass.errors import ExportError, LoadError
from redpass.export import to_pt2
from redpass.passes.drop_branches import DropBranches
from redpass.program import Program
from redpass.rewrite import apply
from redpass.verify.inputs import random_inputs

ELSEWHERE = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "redpass":
            raise ImportError("redpass is not here")

sys.meta_path.insert(0, Refuse())
import torch

module = torch.export.load(sys.argv[1]).module()
for case in torch.load(sys.argv[2], weights_only=True):
    with torch.no_grad():
        found = module(case["inputs"])
    assert list(found) == list(case["outputs"]), list(found)
    for name, wanted in case["outputs"].items():
        torch.testing.assert_close(found[name], wanted, rtol=1e-5, atol=1e-6)
    print("ran", *case["sizes"])
assert not any(name.partition(".")[0] == "redpass" for name in sys.modules)
"""


def test_it_loads_without_redpass_and_runs_at_other_sizes(llama: Program, tmp_path: Path) -> None:
    report = to_pt2(llama, tmp_path / "model.pt2")
    assert max(report.worst.values()) <= 1
    cases = []
    for sizes in ((1, 1, 0), (3, 7, 0), (2, 1, 9), (1, 1, 1), (1, 13, 4)):
        values = random_inputs(llama, dict(zip(("batch", "seq", "past"), sizes, strict=True)))
        names = [port.name for port in llama.signature.outputs]
        outputs = dict(zip(names, llama(**values), strict=True))
        cases.append({"sizes": list(sizes), "inputs": values, "outputs": outputs})
    torch.save(cases, tmp_path / "cases.pt")
    command = [sys.executable, "-I", "-c", ELSEWHERE, "model.pt2", "cases.pt"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:2] == ["ran 1 1 0", "ran 3 7 0"]


def test_the_original_weights_are_not_copied_or_changed(residual: Program, tmp_path: Path) -> None:
    before = {name: tensor.clone() for name, tensor in residual.weights.items()}
    text = residual.text
    to_pt2(residual, tmp_path / "model.pt2")
    assert residual.text == text
    assert all(torch.equal(before[name], t) for name, t in residual.weights.items())


def test_dimensions_keep_their_ranges(llama: Program, tmp_path: Path) -> None:
    to_pt2(llama, tmp_path / "model.pt2")
    ranges = torch.export.load(tmp_path / "model.pt2").range_constraints
    assert {str(symbol): int(bounds.lower) for symbol, bounds in ranges.items()} == {
        "batch": 1, "seq": 1, "past": 0,
    }  # fmt: skip


def test_weights_without_data_are_refused(residual: Program, tmp_path: Path) -> None:
    fake = replace(residual, weights={k: v.to("meta") for k, v in residual.weights.items()})
    with pytest.raises(ExportError, match=r"model\.pt2: the weights carry no data"):
        to_pt2(fake, tmp_path / "model.pt2")
    assert not list(tmp_path.iterdir())


def test_a_file_that_computes_something_else_is_found(
    residual: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = replace(residual, weights={k: 1.01 * v for k, v in residual.weights.items()})
    from redpass.export import pt2

    wrong = pt2.exported_program(other)
    monkeypatch.setattr(pt2, "exported_program", lambda _: wrong)
    with pytest.raises(ExportError, match=r"gives other results .* output 'output_0': error"):
        to_pt2(residual, tmp_path / "model.pt2")
    assert not list(tmp_path.iterdir())


def test_it_comes_back_as_the_same_program(llama: Program, tmp_path: Path) -> None:
    to_pt2(llama, tmp_path / "model.pt2")
    again = redpass.load(tmp_path / "model.pt2")
    assert again.signature == llama.signature
    assert again.signature.state
    assert again.origin.task == "causal-lm"
    assert again.text == llama.text
    values = random_inputs(llama, {"batch": 3, "seq": 5, "past": 2})
    assert all(map(torch.equal, again(**values), llama(**values)))


def test_a_model_without_attention_comes_back_too(llama: Program, tmp_path: Path) -> None:
    """The past length is then a part of one sum only, and no size of its own."""
    labels = ("layers.0.attention", "layers.1.attention")
    plan = DropBranches(only=labels).plan(llama, redpass.facts.Facts(llama))
    bare = apply(llama, plan.actions)
    assert not bare.signature.state
    to_pt2(bare, tmp_path / "model.pt2")
    again = redpass.load(tmp_path / "model.pt2")
    assert again.signature == bare.signature
    values = random_inputs(llama, {"batch": 1, "seq": 1, "past": 9})
    kept = {port.name: values[port.name] for port in again.signature.inputs}
    assert all(map(torch.equal, again(**kept), bare(**kept)))


def test_names_that_python_knows_come_back(tmp_path: Path) -> None:
    linear = torch.nn.Linear(4, 4)
    program = redpass.load(linear, inputs=["input:float32[batch,4]"])
    to_pt2(program, tmp_path / "model.pt2")
    again = redpass.load(tmp_path / "model.pt2")
    assert [str(port) for port in again.signature.inputs] == ["input:float32[batch,4]"]


def _renamed(text: dict[str, Any]) -> None:
    text["state"] = [["input", "gone"]]


def _wider(text: dict[str, Any]) -> None:
    text["inputs"][0][2] = ["batch", 5]


def _other_dtype(text: dict[str, Any]) -> None:
    text["inputs"][0][1] = "int64"


def _fewer(text: dict[str, Any]) -> None:
    text["outputs"] = []


def _newer(text: dict[str, Any]) -> None:
    text["format"] = 99


def _code(text: dict[str, Any]) -> None:
    text["inputs"][0][2] = ["__import__('os')", 4]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_renamed, "state 'input' -> 'gone'"),
        (_wider, r"the graph has \['batch', '4'\] for input:float32\[batch,5\]"),
        (_other_dtype, "float32 of 2 axes for input:int64"),
        (_fewer, "1 inputs and 1 outputs"),
        (_newer, "format 99, expected 1"),
        (_code, 'size "__import__'),
    ],
)
def test_a_changed_signature_is_refused(
    tmp_path: Path, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    program = redpass.load(torch.nn.Linear(4, 4), inputs=["input:float32[batch,4]"])
    to_pt2(program, tmp_path / "model.pt2")
    with (
        zipfile.ZipFile(tmp_path / "model.pt2") as old,
        zipfile.ZipFile(tmp_path / "bad.pt2", "w") as new,
    ):
        for name in old.namelist():
            data = old.read(name)
            if name.endswith("extra/redpass.json"):
                text = json.loads(data)
                change(text)
                data = json.dumps(text).encode()
            new.writestr(name, data)
    with pytest.raises(LoadError, match=message) as caught:
        redpass.load(tmp_path / "bad.pt2")
    assert caught.value.file == str(tmp_path / "bad.pt2")
