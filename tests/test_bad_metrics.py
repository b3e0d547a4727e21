"""Metrics that cannot be measured are told before any candidate is planned or tried."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable

import pytest
import torch

import redpass
from redpass.data import Batches
from redpass.errors import DataError, RedpassError, UsageError
from redpass.passes.drop_branches import DropBranches
from redpass.program import Program


@pytest.fixture
def nothing_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any planning would be long work on a large model."""

    def plan(*_: object) -> None:
        raise AssertionError("long work began")

    monkeypatch.setattr(DropBranches, "plan", plan)


def run(program: Program, data: redpass.Splits, budget: str) -> None:
    redpass.optimize(program, "drop_branches", budget=budget, data=data)


@pytest.mark.usefixtures("nothing_starts")
@pytest.mark.parametrize(
    ("budget", "kind", "message"),
    [
        ("relativ_error<=1", UsageError, "did you mean 'relative_error'"),
        ("bad_metrics:raises>=0", DataError, r"metric 'bad_metrics:raises': raised KeyError: 'no'"),
        ("bad_metrics:nan>=0", DataError, "metric 'bad_metrics:nan': returned NaN"),
        ("bad_metrics:nothing>=0", UsageError, "holds no function 'nothing'"),
        ("bad_metrics:many>=0", DataError, "are too few for metric 'bad_metrics:many'"),
        ("perplexity<=9", DataError, "there is no 'input_ids'"),
        ("kl_p99<=1", DataError, "24 positions are too few for metric 'kl_p99'"),
    ],
)
def test_it_is_told_at_once(
    residual: Program,
    residual_data: redpass.Splits,
    monkeypatch: pytest.MonkeyPatch,
    budget: str,
    kind: type[RedpassError],
    message: str,
) -> None:
    monkeypatch.setitem(sys.modules, "bad_metrics", metrics())
    short = redpass.Splits(
        residual_data.calibration, residual_data.choosing[:1], residual_data.reporting
    )
    with pytest.raises(kind, match=message):
        run(residual, short, budget)


def metrics() -> types.ModuleType:
    def raises(*_: object) -> float:
        raise KeyError("no")

    def nan(*_: object) -> float:
        return float("nan")

    def many(*_: object) -> float:
        return 1.0

    module = types.ModuleType("bad_metrics")
    functions: tuple[Callable[..., float], ...] = (raises, nan, many)
    for function in functions:
        setattr(module, function.__name__, function)
    many.least = 1000  # type: ignore[attr-defined]
    return module


@pytest.mark.usefixtures("nothing_starts")
def test_rows_in_two_splits_are_refused(residual: Program) -> None:
    rows = Batches(({"x": torch.ones(2, 6, 8)},), "rows.npz")
    with pytest.raises(DataError, match="the same row is in 'calibration' and 'choosing'"):
        run(residual, redpass.Splits(rows, rows, rows), "relative_error<=1")
