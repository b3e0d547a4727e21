"""`redpass analyze`: where the redundancy of a model is, measured on data; nothing is changed."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

from typer import Option

from redpass.cli import sources
from redpass.cli.optimize import command_line
from redpass.cli.options import DataFile, DataOptions, Model, ModelOptions, PathOption, RunOptions
from redpass.cli.screen import Screen
from redpass.errors import DataError
from redpass.record import RunRecord


def analyze(
    model: Model,
    source: ModelOptions,
    rows: DataOptions,
    run: RunOptions,
    data: DataFile = None,
    report: Annotated[
        Path | None, PathOption(metavar="FILE", help="Also write the HTML report here.")
    ] = None,
    force: Annotated[bool, Option("--force", help="Replace an older report.")] = False,
) -> None:
    """Measure how alike the parts of MODEL are; nothing is changed."""
    from redpass.artifact import check_target
    from redpass.report import terminal

    sources.check_model(model, source)
    if data is None:
        raise DataError("similarity is measured on data", place="--data", hint="pass --data FILE")
    sources.check_data(data)
    if report is not None:
        check_target(report, model, force=force)
    screen = Screen(run)
    record = _measure(screen, model, source, rows, data)
    screen.emit(asdict(record))
    screen.show(*(terminal.matrix(item, color=screen.has_color) for item in record.matrices))
    screen.show(terminal.branches(record.branches))
    if report is not None:
        _write(record, report, force=force)
        screen.wrote([report])


def _measure(
    screen: Screen, model: Path, source: ModelOptions, rows: DataOptions, data: Path
) -> RunRecord:
    from redpass import pipeline
    from redpass.data import split

    with screen.listening() as listener:
        sources.prepare(screen.run)
        program = sources.load(
            model, source, data=data, tokenizer=rows.tokenizer, listener=listener
        )
        batches = sources.read(data, program, rows)
        # A run without passes is the measurement alone.
        return pipeline.optimize(
            program, (), data=split(batches), listener=listener, command=command_line()
        ).record


def _write(record: RunRecord, target: Path, *, force: bool) -> None:
    from redpass.artifact import staged_file
    from redpass.report import render

    with staged_file(target, force=force) as path:
        path.write_text(render(record), encoding="utf-8")
