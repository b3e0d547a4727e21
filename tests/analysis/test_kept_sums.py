"""Sums that a killed run kept are the sums, to the bit, and nothing is run for them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

import redpass
from redpass.analysis import kept_sums
from redpass.analysis.kept_sums import recalled
from redpass.analysis.observers import CrossGram, Observer, Spread
from redpass.analysis.statistics import collect
from redpass.blocks import Blocks
from redpass.data import Batches
from redpass.program import Program


@pytest.fixture(scope="module")
def program() -> Program:
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(6, 9), torch.nn.ReLU(), torch.nn.Linear(9, 4))
    specs = ["input:float32[batch,6]"]
    return redpass.load(module.eval(), example={"input": torch.randn(3, 6)}, inputs=specs)


@pytest.fixture(scope="module")
def observers(program: Program) -> Sequence[Observer]:
    names = [node.name for node in program.graph.nodes if node.op == "call_function"]
    return [CrossGram(names[0], names[0]), Spread(names[1]), CrossGram(names[0], names[2])]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "sums"


def rows(seed: int) -> Batches:
    generator = torch.Generator().manual_seed(seed)
    return Batches(tuple({"input": torch.randn(5, 6, generator=generator)} for _ in range(3)))


def never(*_: object, **__: object) -> object:
    raise AssertionError("collected again")


def test_sums_come_back_to_the_bit(
    program: Program, observers: Sequence[Observer], path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    truth = collect(program, observers, rows(0))
    first = recalled(program, observers, rows(0), Blocks(path, "work"))
    monkeypatch.setattr(kept_sums, "collect", never)
    again = recalled(program, observers, rows(0), Blocks(path, "work", fresh=False))
    for found in (first, again):
        assert found.tokens == truth.tokens
        assert found.totals.keys() == truth.totals.keys()
        assert all(torch.equal(found.totals[key], truth.totals[key]) for key in truth.totals)


def test_other_data_observers_and_weights_are_collected(
    program: Program, observers: Sequence[Observer], path: Path
) -> None:
    kept = Blocks(path, "work")
    recalled(program, observers, rows(0), kept)
    weights = {name: value + 1 for name, value in program.weights.items()}
    other = Program(program.graph, weights, program.signature, program.origin)
    for judged, wanted, data in (
        (program, observers, rows(1)),
        (program, observers[:2], rows(0)),
        (other, observers, rows(0)),
    ):
        truth = collect(judged, wanted, data)
        found = recalled(judged, wanted, data, kept)
        assert found.totals.keys() == truth.totals.keys()
        assert all(torch.equal(found.totals[key], truth.totals[key]) for key in truth.totals)


@pytest.mark.parametrize("data", [b"", b"12345678", bytes(8000)])
def test_bytes_of_another_length_are_not_taken(
    program: Program, observers: Sequence[Observer], path: Path, data: bytes
) -> None:
    kept = Blocks(path, "work")
    kept.find = lambda _: (None, bytearray(data))  # type: ignore[method-assign]
    truth = collect(program, observers, rows(0))
    found = recalled(program, observers, rows(0), kept)
    assert all(torch.equal(found.totals[key], truth.totals[key]) for key in truth.totals)


def test_without_a_file_nothing_is_kept(program: Program, observers: Sequence[Observer]) -> None:
    truth = collect(program, observers, rows(0))
    found = recalled(program, observers, rows(0), Blocks())
    assert all(torch.equal(found.totals[key], truth.totals[key]) for key in truth.totals)
