"""Writing programs: `.pt2`, ONNX, Hugging Face folders, each compared with the program."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from redpass.errors import UsageError, nearest
from redpass.export.check import Report
from redpass.export.huggingface import to_huggingface
from redpass.export.onnx import to_onnx
from redpass.export.pt2 import to_pt2
from redpass.program import Program

FORMATS = {"pt2": to_pt2, "onnx": to_onnx, "hf": to_huggingface}
NAMES = {"pt2": "model.pt2", "onnx": "model.onnx", "hf": "hf"}
"""What each form is called inside the folder."""


def write(
    program: Program, folder: str | Path, formats: Sequence[str] = ("pt2", "onnx")
) -> dict[str, Report]:
    """Writes `model.pt2`, `model.onnx`, `hf/` into an existing folder and compares each.

    Raises:
        UsageError: an unknown format.
        ExportError: a format that cannot hold the program, or gives other numbers.
    """
    for name in formats:
        if name not in FORMATS:
            raise UsageError(f"unknown format '{name}'", hint=nearest(name, FORMATS))
    return {name: FORMATS[name](program, Path(folder) / NAMES[name]) for name in formats}


__all__ = ["FORMATS", "NAMES", "Report", "to_huggingface", "to_onnx", "to_pt2", "write"]
