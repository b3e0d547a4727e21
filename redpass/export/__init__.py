"""Writing programs to files: `.pt2` and ONNX, each compared with the program before it counts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from redpass.errors import UsageError, nearest
from redpass.export.check import Report
from redpass.export.onnx import to_onnx
from redpass.export.pt2 import to_pt2
from redpass.program import Program

FORMATS = {"pt2": to_pt2, "onnx": to_onnx}


def write(
    program: Program, folder: str | Path, formats: Sequence[str] = ("pt2", "onnx")
) -> dict[str, Report]:
    """Writes `model.pt2`, `model.onnx` into an existing folder and compares each with `program`.

    Raises:
        UsageError: an unknown format.
        ExportError: a format that cannot hold the program, or gives other numbers.
    """
    for name in formats:
        if name not in FORMATS:
            raise UsageError(f"unknown format '{name}'", hint=nearest(name, FORMATS))
    return {name: FORMATS[name](program, Path(folder) / f"model.{name}") for name in formats}


__all__ = ["FORMATS", "Report", "to_onnx", "to_pt2", "write"]
