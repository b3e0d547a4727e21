"""`redpass explain`: why each place was or was not rewritten."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

from typer import Argument

from redpass.cli import sources
from redpass.cli.optimize import Job
from redpass.cli.options import (
    Budget,
    DataFile,
    DataOptions,
    Kernels,
    Model,
    ModelOptions,
    Passes,
    Reduce,
    RunOptions,
)
from redpass.cli.screen import Screen
from redpass.errors import UsageError, nearest
from redpass.record import RunRecord

Place = Annotated[
    str,
    Argument(metavar="[PLACE]", help="Part of a branch's or node's name; all by default."),
]


def explain(
    model: Model,
    source: ModelOptions,
    rows: DataOptions,
    run: RunOptions,
    place: Place = "",
    data: DataFile = None,
    budget: Budget = "",
    passes: Passes = None,
    kernels: Kernels = None,
    reduce: Reduce = None,
) -> None:
    """Tell why each place was or was not rewritten.

    MODEL is a folder that `redpass optimize` wrote, or a model, which then gets a dry run.
    """
    from redpass.report import terminal

    screen = Screen(run)
    if (model / "report.json").is_file():
        record = _read(model)
    else:
        sources.check_model(model, source)
        job = Job(model, source, rows, run, data, budget, passes)
        job.kernels, job.reduce = kernels, reduce
        record = job.plan(screen)
    _check_known(record, place)
    screen.emit(_chosen(record, place))
    screen.show(terminal.places(record, place))


def _read(folder: Path) -> RunRecord:
    from redpass.report import read_record

    return read_record(folder)


def _check_known(record: RunRecord, place: str) -> None:
    names = {action.target for action in record.actions} | {skip.target for skip in record.skips}
    if place and not any(place in name for name in names):
        raise UsageError(
            "no pass looked at a place of this name", place=place, hint=nearest(place, names)
        )


def _chosen(record: RunRecord, place: str) -> dict[str, object]:
    return {
        "actions": [asdict(item) for item in record.actions if place in item.target],
        "skips": [asdict(item) for item in record.skips if place in item.target],
    }
