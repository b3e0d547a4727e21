"""`redpass inspect`: what is in a model, and what it costs."""

from __future__ import annotations

from redpass.cli import sources
from redpass.cli.options import DataFile, DataOptions, Model, ModelOptions, RunOptions
from redpass.cli.screen import Screen


def inspect(
    model: Model,
    source: ModelOptions,
    rows: DataOptions,
    run: RunOptions,
    data: DataFile = None,
) -> None:
    """Show the parts of MODEL with parameters, FLOPs, bytes and cache per token."""
    from redpass.report.inspection import tables

    sources.check_model(model, source)
    screen = Screen(run)
    with screen.listening() as listener:
        from redpass.analysis import inspection

        sources.prepare(run)
        program = sources.load(
            model, source, data=data, tokenizer=rows.tokenizer, listener=listener
        )
        found = inspection(program)
    screen.emit(found.to_json())
    screen.show(tables(found))
