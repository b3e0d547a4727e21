"""`benchmarks/gpu.py` from end to end, with the interpreter for a card and small sizes.

Times are those of the interpreter and mean nothing. All else is what runs on a card: the cases,
kernels with all their configurations, `torch.compile`, the model, the tables and the cache.
"""

from __future__ import annotations

import functools
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

BENCHMARKS = Path(__file__).parents[4] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import gpu  # noqa: E402
import gpu_cases  # noqa: E402

from redpass import ops  # noqa: E402
from redpass.codegen import tuning  # noqa: E402
from redpass.codegen.ops import OPS, Op  # noqa: E402
from redpass.program import Program  # noqa: E402

UNPATCHED = torch.compile
CARD = tuning.Device("Interpreter of Triton", "0.0")
MAKER = gpu_cases.Maker(torch.float32, "cpu", 256)
LLAMA = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 61, "max_position_embeddings": 64,
    "rope_theta": 500000.0,
}  # fmt: skip


class Timer:
    """Times one call, and keeps what it gave."""

    def __init__(self) -> None:
        self.results: list[Any] = []

    def __call__(self, call: Callable[[], Any]) -> float:
        start = time.perf_counter()
        self.results.append(call())
        return 1e6 * (time.perf_counter() - start)


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """No C++ compiler; small sizes; ops on "the card" launch their kernels."""
    compiled = functools.partial(torch.compile, backend="aot_eager")
    monkeypatch.setattr(torch, "compile", compiled)
    sizes = ({"batch": 1, "seq": 5, "past": 0}, {"batch": 2, "seq": 1, "past": 7})
    monkeypatch.setattr(gpu, "MODEL_SIZES", sizes)
    monkeypatch.setattr(gpu, "on_device", on_the_interpreter)


def on_the_interpreter(program: Program, device: str) -> Callable[..., Any]:
    assert device == MAKER.device
    module = program.graph_module
    for node in module.graph.nodes:
        if ops.namespace(node) == "redpass":
            node.target = launcher(OPS[ops.base_name(node)])
    module.recompile()

    def call(**values: Tensor) -> Any:
        with torch.no_grad():
            return module(*program.bind((), values))

    return call


LAUNCHED: list[str] = []


def launcher(op: Op) -> Callable[..., Any]:
    def launched(*arguments: Any) -> Any:
        LAUNCHED.append(op.name)
        return op.launch(op.configs(*arguments)[0].options(), *arguments)

    return launched


QUICK = ("add_norm", "gated_feed_forward", "low_rank_linear")
"""Ops that take the interpreter a moment; attention takes it seconds a call."""


def quickest() -> Iterator[gpu_cases.Case]:
    """One case of each quick op, the one that reads least."""
    every = list(gpu_cases.cases(MAKER))
    for name in QUICK:
        yield min((case for case in every if case.op.name == name), key=lambda case: case.bytes)


def written(folder: Path) -> tuple[str, Mapping[str, Any]]:
    return (folder / "gpu.md").read_text(), json.loads((folder / "gpu.json").read_text())


def test_a_whole_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "cases", lambda maker: quickest())
    timer = Timer()
    gpu.run(CARD, MAKER, timer, tmp_path, tmp_path / "cache", LLAMA)
    text, data = written(tmp_path)
    assert data["about"]["GPU"] == CARD.name
    assert [row["op"] for row in data["rows"]] == list(QUICK)
    assert [row["note"] for row in data["rows"]] == [""] * len(QUICK)
    assert all(row[key] > 0 for row in data["rows"] for key in ("kernel", "rewritten", "compiled"))
    assert text.count("\n| ") == 1 + len(QUICK) + 1 + len(gpu.MODEL_SIZES)
    assert len(data["model"]) == len(gpu.MODEL_SIZES)
    # The last results are the model's: as it is, then with kernels, at each size.
    count = len(gpu.MODEL_SIZES)
    plain, lowered = timer.results[-2 * count : -count], timer.results[-count:]
    for one, other in zip(plain, lowered, strict=True):
        torch.testing.assert_close(one, other)
    assert set(LAUNCHED) == {"add_norm", "rotary", "gated_feed_forward"}
    # `auto` reads the timings.
    records = tuning.read(tmp_path / "cache", CARD)
    assert {shape.op for shape in records.timings} == set(QUICK)


def test_what_was_measured_is_there_when_the_model_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "cases", lambda maker: iter(list(quickest())[:1]))
    monkeypatch.setattr(gpu, "model", lambda *sizes: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        gpu.run(CARD, MAKER, Timer(), tmp_path, tmp_path, LLAMA)
    text, data = written(tmp_path)
    assert "| add_norm |" in text
    assert "model" not in data


def test_every_shape_is_compiled_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch gives up on a function that it compiled for eight shapes, without a word."""
    compiled: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        compiled.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", functools.partial(UNPATCHED, backend=backend))
    rows = range(2, 14)
    for count in rows:
        x = torch.randn(count, 16)
        gpu.rivals_of(OPS["add_norm"], (x, x, None, None, 1e-5, "rms"))["torch.compile"]()
    assert len(compiled) == len(rows)


@pytest.mark.slow
def test_all_cases(tmp_path: Path) -> None:
    gpu.run(CARD, MAKER, Timer(), tmp_path, tmp_path, None)
    rows = written(tmp_path)[1]["rows"]
    assert [row["note"] for row in rows] == [""] * len(list(gpu_cases.cases(MAKER)))
