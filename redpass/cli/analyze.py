"""`redpass analyze`: where the redundancy of a model is, measured on data; nothing is changed."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Option

from redpass.cli import sources
from redpass.cli.optimize import command_line
from redpass.cli.options import DataFile, DataOptions, Model, ModelOptions, PathOption, RunOptions
from redpass.cli.screen import Screen
from redpass.errors import DataError, clean
from redpass.record import RunRecord

if TYPE_CHECKING:
    from redpass.facts import Facts


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
    if record.layers:
        screen.show(terminal.layers(record.layers))
    screen.show(terminal.branches(record.branches))
    screen.show(*(f"note: {clean(note, 400)}" for note in record.notes))
    if report is not None:
        _write(record, report, force=force)
        screen.wrote([report])


def _measure(
    screen: Screen, model: Path, source: ModelOptions, rows: DataOptions, data: Path
) -> RunRecord:
    from redpass import pipeline
    from redpass.analysis.stream_statistics import memory
    from redpass.data import split
    from redpass.facts import Facts
    from redpass.report.figures import size

    with screen.listening() as listener:
        sources.prepare(screen.run)
        program = sources.load(
            model, source, data=data, tokenizer=rows.tokenizer, listener=listener
        )
        batches = sources.read(data, program, rows)
        splits = split(batches)
        facts = Facts(program, splits.calibration)
        listener.message(f"the run's sums take {size(memory(program, facts))} of memory")
        # A run without passes is the measurement alone.
        record = pipeline.optimize(
            program, (), data=splits, listener=listener, command=command_line()
        ).record
        return _with_macro(record, facts)


def _with_macro(record: RunRecord, facts: Facts) -> RunRecord:
    """Adds what is measured here only, as it costs a run for every second layer."""
    from redpass.analysis import macro_influence

    found = facts.get(macro_influence)
    layers = [
        replace(layer, macro_influence=found.layers.get(layer.label)) for layer in record.layers
    ]
    skips = [f"{label}: {why}" for label, why in found.skips.items()]
    reasons = [found.reason] if found.reason else []
    return replace(record, layers=layers, notes=[*record.notes, *reasons, *skips])


def _write(record: RunRecord, target: Path, *, force: bool) -> None:
    from redpass.artifact import staged_file
    from redpass.report.page import render

    with staged_file(target, force=force) as path:
        path.write_text(render(record), encoding="utf-8")
