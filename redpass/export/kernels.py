"""The hot paths of a program as Triton files, as one of the forms a result is written in."""

from __future__ import annotations

from pathlib import Path

import redpass
from redpass.codegen.emit import emit
from redpass.codegen.folder import write_kernels
from redpass.export.check import Report
from redpass.program import Program


def to_kernels(program: Program, path: str | Path) -> Report:
    """Writes `kernels/` at `path`, whose parent exists; see docs/kernels.md.

    Nothing is compared here: each file comes with a test that does.

    Returns:
        The report, with a note of how many hot paths there are.
    """
    path = Path(path)
    files, skips = emit(program, origin=f"redpass {redpass.__version__}")
    origin = program.origin
    write_kernels(path.parent, files, skips, model=origin.path, model_digest=origin.digest)
    places = sum(len(file.places) for file in files)
    note = f"{len(files)} files for {places} places, {len(skips)} left out"
    return Report(path, "not compared: run the tests beside the files", {}, (note,))
