"""`redpass export`: a model in another form, unchanged."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from redpass.cli import sources
from redpass.cli.options import (
    DataFile,
    DataOptions,
    Model,
    ModelOptions,
    ResultOptions,
    RunOptions,
)
from redpass.cli.screen import Screen
from redpass.errors import UsageError

if TYPE_CHECKING:
    from redpass.program import Program

SUFFIXES = {".onnx": "onnx", ".pt2": "pt2"}


def export(
    model: Model,
    source: ModelOptions,
    rows: DataOptions,
    result: ResultOptions,
    run: RunOptions,
    data: DataFile = None,
) -> None:
    """Write MODEL as .pt2 or ONNX, compared with the original on fresh inputs.

    With --out FILE.onnx or FILE.pt2 the one file is written, else a folder.
    """
    from redpass.artifact import staged, staged_file

    formats = sources.check_formats(result.format)
    sources.check_model(model, source)
    if result.out is None:
        raise UsageError("no place for the result", place="--out", hint="name a folder or a file")
    screen = Screen(run)
    one = SUFFIXES.get(result.out.suffix)
    stage = staged_file if one else staged
    with (
        stage(result.out, source=model, force=result.force) as path,
        screen.listening() as listener,
    ):
        sources.prepare(run)
        program = sources.load(
            model, source, data=data, tokenizer=rows.tokenizer, listener=listener
        )
        listener.start("writing")
        _write(program, path, (one,) if one else formats, single=bool(one))
        listener.finish("writing")
    paths = [result.out] if one else sorted(p for p in result.out.rglob("*") if p.is_file())
    screen.emit({"written": [str(path) for path in paths]})
    screen.wrote(paths)


def _write(program: Program, path: Path, formats: tuple[str, ...], *, single: bool) -> None:
    from redpass import export as exporter

    if not single:
        exporter.write(program, path, formats)
    elif formats == ("onnx",):
        exporter.to_onnx(program, path)
    else:
        exporter.to_pt2(program, path)
