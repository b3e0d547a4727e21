"""Writing programs: `.pt2`, ONNX, Hugging Face folders, each compared with the program."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from redpass.errors import ExportError, UsageError, nearest
from redpass.export.check import Report
from redpass.export.huggingface import to_huggingface
from redpass.export.kernels import to_kernels
from redpass.export.onnx import to_onnx
from redpass.export.pt2 import to_pt2
from redpass.program import Program

FORMATS = {"pt2": to_pt2, "onnx": to_onnx, "hf": to_huggingface, "kernels": to_kernels}
NAMES = {"pt2": "model.pt2", "onnx": "model.onnx", "hf": "hf", "kernels": "kernels"}
"""What each form is called inside the folder."""


def write(
    program: Program, folder: str | Path, formats: Sequence[str] = ("pt2", "onnx")
) -> dict[str, Report]:
    """Writes `model.pt2`, `model.onnx`, `hf/`, `kernels/` into an existing folder.

    Each but the last is compared with the program.

    Raises:
        UsageError: an unknown format.
        ExportError: a format that cannot hold the program, or gives other numbers.
    """
    for name in formats:
        if name not in FORMATS:
            raise UsageError(f"unknown format '{name}'", hint=nearest(name, FORMATS))
    return {name: FORMATS[name](program, Path(folder) / NAMES[name]) for name in formats}


def write_where_possible(program: Program, folder: str | Path) -> list[str]:
    """Writes `hf/` beside the other forms where a Hugging Face folder can hold the result.

    Returns:
        Notes for the report: why it was left out, or what is other in it. Nothing for a model that
        came from elsewhere.
    """
    if program.origin.kind != "huggingface":
        return []
    if program.lineage is None:
        return ["hf/ was left out: exact rewrites change no weights there; --format hf writes it"]
    try:
        report = to_huggingface(program, Path(folder) / NAMES["hf"])
    except ExportError as error:
        place = f"{error.place}: " if error.place else ""
        return [f"hf/ was left out: {place}{error.found}"]
    return [f"hf/: {note}" for note in report.notes]


__all__ = [
    "FORMATS", "NAMES", "Report",
    "to_huggingface", "to_kernels", "to_onnx", "to_pt2", "write", "write_where_possible",
]  # fmt: skip
