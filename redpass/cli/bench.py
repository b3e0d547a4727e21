"""`redpass bench`: original against result, measured in turn."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Option

from redpass.cli import sources
from redpass.cli.options import DataFile, DataOptions, Model, ModelOptions, PathArgument, RunOptions
from redpass.cli.screen import Screen
from redpass.errors import UsageError, nearest

RUNNERS = ("eager", "compile", "onnxruntime")

Result = Annotated[Path, PathArgument(metavar="RESULT", help="What redpass made of it.")]


def bench(
    model: Model,
    result: Result,
    source: ModelOptions,
    rows: DataOptions,
    run: RunOptions,
    data: DataFile = None,
    runners: Annotated[str, Option(metavar="NAMES", help="What to run them in.")] = ",".join(
        RUNNERS
    ),
    rounds: Annotated[int, Option(min=3, help="How often each is measured.")] = 20,
) -> None:
    """Compare the speed of MODEL with that of RESULT, measured in turn."""
    from redpass.report.terminal import latency

    names = _runners(runners)
    sources.check_model(model, source)
    sources.check_model(result, source)
    screen = Screen(run)
    with screen.listening() as listener:
        from redpass import bench as measuring

        sources.prepare(run)
        original, optimized = (
            sources.load(path, source, data=data, tokenizer=rows.tokenizer, listener=listener)
            for path in (model, result)
        )
        listener.start("measuring")
        table = measuring.compare(original, optimized, runners=names, rounds=rounds)
        listener.finish("measuring")
    screen.emit(table.to_json())
    screen.show(latency(table.rows, table.machine))


def _runners(text: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    for name in names:
        if name not in RUNNERS:
            hint = nearest(name, RUNNERS)
            raise UsageError(f"unknown runner '{name}'", place="--runners", hint=hint)
    return names
