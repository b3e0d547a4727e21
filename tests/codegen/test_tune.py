"""Tuning with a stub timer: what is kept, what is dropped and why, and how it is picked again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import hot_models
import pytest
import torch

from redpass.codegen import ops as kernels_of
from redpass.codegen import tune as tuning_run
from redpass.codegen import tuning
from redpass.codegen.ops import add_norm
from redpass.codegen.ops.op import Config, Op
from redpass.codegen.tune import chooser, materialised, tune, tune_program
from redpass.codegen.tuning import Device, Records, Shape

CARD = Device("NVIDIA H100 80GB HBM3", "580.1")
CONFIGS = tuple(Config.of(warps=warps, BLOCK=16) for warps in (1, 2, 4, 8))
ARGUMENTS = (torch.randn(6, 16), torch.randn(6, 16), None, None, 1e-6, "rms")


def op(launch: Callable[..., Any] | None = None) -> Op:
    """`add_norm` whose launch is its reference, with four configurations."""

    def runs(options: dict[str, int], *arguments: Any) -> Any:
        return add_norm.OP.reference(*arguments)

    return replace(add_norm.OP, launch=launch or runs, configs=lambda *_: CONFIGS)


@pytest.fixture(autouse=True)
def _source(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stub launches have no kernel file of their own."""
    monkeypatch.setattr(tuning, "source_digest", lambda op: "ab" * 32)
    monkeypatch.setattr(tuning, "_said", set())


class Clock:
    """Gives the next of some times; remembers how often it was asked."""

    def __init__(self, *micros: float) -> None:
        self.micros = list(micros)

    def __call__(self, call: Callable[[], Any]) -> float:
        call()
        return self.micros.pop(0)


RIVALS = {"eager PyTorch": lambda: None, "torch.compile": lambda: None}


def test_the_fastest_configuration_and_the_best_rival_are_kept() -> None:
    found = tune(op(), ARGUMENTS, Clock(9.0, 7.0, 8.0, 7.5, 30.0, 10.0), RIVALS)
    assert found is not None
    assert (found.config, found.micros) == (CONFIGS[1].options(), 7.0)
    assert (found.rival, found.rival_micros) == ("torch.compile", 10.0)
    assert found.shape == Shape.of(op(), ARGUMENTS).bucket


def failing(bad: Callable[[], Any], *warps: int) -> Callable[..., Any]:
    def launch(options: dict[str, int], *arguments: Any) -> Any:
        return bad() if options["num_warps"] in warps else add_norm.OP.reference(*arguments)

    return launch


def out_of_memory() -> Any:
    raise RuntimeError("out of resource: shared memory")


def not_a_number() -> Any:
    return torch.full((5, 16), float("nan")), torch.full((5, 16), float("nan"))


def wrong() -> Any:
    return torch.zeros(5, 16), torch.zeros(5, 16)


@pytest.mark.parametrize("bad", [out_of_memory, not_a_number, wrong])
def test_a_configuration_that_fails_or_is_wrong_is_dropped(bad: Callable[[], Any]) -> None:
    """It would have been the fastest."""
    clock = Clock(5.0, 6.0, 10.0, 10.0)
    found = tune(op(failing(bad, 1, 2)), ARGUMENTS, clock, RIVALS)
    assert found is not None
    assert found.config == CONFIGS[2].options()
    assert not clock.micros, "what is dropped is not timed"


def test_no_configuration_that_works_is_said_once() -> None:
    bad = op(failing(out_of_memory, 1, 2, 4, 8))
    assert tune(bad, ARGUMENTS, Clock(), RIVALS) is None
    (said,) = tuning._said
    assert "no configuration that works here" in said
    assert "shared memory" in said


def test_tuned_configurations_are_picked_for_calls() -> None:
    timing = tune(op(), ARGUMENTS, Clock(9.0, 7.0, 8.0, 7.5, 30.0, 10.0), RIVALS)
    assert timing is not None
    choose = chooser(Records(CARD, {timing.shape: timing}))
    assert choose(op(), ARGUMENTS) == CONFIGS[1]
    nearly = (torch.randn(7, 16), torch.randn(7, 16), *ARGUMENTS[2:])
    assert choose(op(), nearly) == CONFIGS[1]
    other = (torch.randn(6, 32), torch.randn(6, 32), *ARGUMENTS[2:])
    assert choose(op(), other) is None


def test_a_program_is_timed_at_each_of_its_places_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Shape] = []

    def noted(op: Op, arguments: Any, timer: Any) -> None:
        asked.append(Shape.of(op, arguments).bucket)

    monkeypatch.setattr(tuning_run, "tune", noted)
    monkeypatch.setattr(tuning_run, "materialised", lambda argument: argument)
    assert tune_program(hot_models.paths()) == []
    assert len(asked) == len(set(asked))
    assert {shape.op for shape in asked} == {"add_norm", "gated_feed_forward", "low_rank_linear"}
    rows = [shape.sizes[0] * shape.sizes[1] for shape in asked if shape.op == "low_rank_linear"]
    assert max(rows) <= 16, "where two products are as fast, nothing is timed"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bool, torch.int64])
def test_contents_are_made_with_the_strides_of_the_graph(dtype: torch.dtype) -> None:
    asked = torch.empty(2, 5, 3, dtype=dtype, device="meta").transpose(1, 2)
    found = materialised(asked, "cpu")
    assert (found.shape, found.stride(), found.dtype) == (asked.shape, asked.stride(), dtype)
    assert materialised(1.5) == 1.5


def test_every_op_has_its_kernel_beside_its_record(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    digests = {tuning.source_digest(op) for op in kernels_of.OPS.values()}
    assert len(digests) == len(kernels_of.OPS)
