"""The folder of emitted kernels: the files, and an index that says what each stands for."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import redpass
from redpass import atomic
from redpass.codegen.aot import AotReport, build_file
from redpass.codegen.emit import Emitted
from redpass.manifest import digest
from redpass.plan import Skip

NAME = "kernels"
INDEX = "kernels.json"
FORMAT = "redpass-kernels-1"


@dataclass(frozen=True)
class Built:
    """One kernel of an emitted file, compiled: for which target and for which kind of call."""

    file: str
    sample: str
    report: AotReport

    def as_row(self) -> dict[str, Any]:
        """Returns what tables and the index show of it."""
        report = self.report
        return {
            "file": f"{self.file}.py",
            "sample": self.sample,
            "kernel": report.kernel,
            "target": report.target,
            "registers": report.registers,
            "spills": report.spills,
            "shared": report.shared,
        }


def write_kernels(
    folder: Path,
    files: Sequence[Emitted],
    skips: Sequence[Skip],
    *,
    targets: Sequence[str] = (),
    model: str = "",
    model_digest: str = "",
) -> tuple[Built, ...]:
    """Writes `kernels/` into an existing folder; returns what was compiled ahead of time.

    Args:
        folder: a place inside a folder that is renamed when whole.
        targets: architectures to compile for.
        model: what the program was made from.
        model_digest: SHA-256 of its weights, hex.

    Raises:
        ExportError: a kernel does not compile.
        OSError: the disk is full or fails.
    """
    inner = folder / NAME
    inner.mkdir()
    for file in files:
        atomic.write(inner / f"{file.name}.py", file.source)
        atomic.write(inner / f"test_{file.name}.py", file.test)
    built = tuple(_build(inner, files, targets)) if targets else ()
    index = {
        "format": FORMAT,
        "model": model,
        "model_digest": model_digest,
        "versions": versions(),
        "kernels": [_entry(inner, file, built) for file in files],
        "skips": [asdict(skip) for skip in skips],
    }
    atomic.write(inner / INDEX, json.dumps(index, indent=1) + "\n")
    return built


def versions() -> dict[str, str]:
    """Returns the versions that decide what an emitted file does."""
    found = {"redpass": redpass.__version__, "python": platform.python_version()}
    for name in ("torch", "triton"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "none"
    return found


def _build(inner: Path, files: Sequence[Emitted], targets: Sequence[str]) -> list[Built]:
    """Compiles all files and writes assembly and machine code to `aot/`."""
    found: list[Built] = []
    (inner / "aot").mkdir()
    with tempfile.TemporaryDirectory(prefix="redpass-") as cache:
        for file in files:
            for target in targets:
                path = inner / f"{file.name}.py"
                for sample, reports in build_file(path, file.samples, target, Path(cache)).items():
                    found += [Built(file.name, sample, report) for report in reports]
    for built in found:
        stem = f"{built.file}.{built.sample}.{built.report.kernel}.{built.report.target}"
        atomic.write(inner / "aot" / f"{stem}.ptx", built.report.ptx)
        (inner / "aot" / f"{stem}.cubin").write_bytes(built.report.cubin)
    return found


def _entry(inner: Path, file: Emitted, built: Sequence[Built]) -> dict[str, Any]:
    path = inner / f"{file.name}.py"
    return {
        "file": path.name,
        "test": f"test_{path.name}",
        "op": f"redpass::{file.op}",
        "places": list(file.places),
        "bytes": path.stat().st_size,
        "sha256": digest(path),
        "operands": {
            operand.name: f"{operand.dtype.removeprefix('torch.')}[{','.join(operand.shape)}]"
            for operand in file.operands
        },
        "tail": list(file.tail),
        "aot": [item.as_row() for item in built if item.file == file.name],
    }
