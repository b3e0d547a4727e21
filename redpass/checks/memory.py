"""Whether there is room for a model, told before libraries are loaded that crash without.

PyTorch and ONNX Runtime end the process, or worse, when they cannot map their own code. So a limit
on the address space is compared with what the work takes before any of them is imported.
"""

from __future__ import annotations

import re
import zipfile
from pathlib import Path

from redpass.errors import DataError, ResourceError

MIB = 1 << 20
BASE = 2048 * MIB
"""Address space of Python with PyTorch, transformers and ONNX Runtime at work (measured 1582 MiB
for a model of 1 MiB), and a quarter more."""

PER_BYTE = 8
"""Bytes of address space for each byte of weights: the model, its copies while it is compared, the
files' buffers."""

_TRIED = re.compile(r"tried to allocate (\d+) bytes")
_WORDS = re.compile(r"can't allocate memory|cannot allocate memory|bad_alloc|out of memory", re.I)


def check(path: Path) -> None:
    """Refuses a model that does not fit under the limits of this process.

    Raises:
        ResourceError: says what is needed and what there is.
    """
    weights = size(path)
    need, limit = BASE + PER_BYTE * weights, _limit()
    if limit is not None and limit < need:
        raise ResourceError(
            f"needs about {need // MIB} MiB of address space, the limit is {limit // MIB} MiB",
            file=path,
            hint=f"raise the limit (ulimit -v {need // 1024})",
        )
    room = free()
    if room is not None and room < weights:
        raise ResourceError(
            f"needs at least {weights // MIB} MiB of memory, {room // MIB} MiB are free",
            file=path,
            hint="use a machine with more memory",
        )


def check_unpacked(path: Path) -> None:
    """Refuses arrays that unpack to more than there is memory for. Raises `DataError`."""
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        total = sum(member.file_size for member in archive.infolist())
    room = free()
    if room is not None and total > room:
        found = f"unpacks to {total // MIB} MiB, {room // MIB} MiB are free"
        raise DataError(found, file=path, hint="give fewer rows")


def size(path: Path) -> int:
    """Returns the bytes of a model's files."""
    if not path.is_dir():
        return path.stat().st_size
    kinds = (".safetensors", ".pt2", ".pt", ".data", ".onnx")
    return sum(p.stat().st_size for p in path.iterdir() if p.suffix in kinds and p.is_file())


def told(error: BaseException) -> ResourceError | None:
    """Returns the error to show for one that says in any words that there was no memory."""
    text = str(error)
    if not isinstance(error, MemoryError) and not _WORDS.search(text):
        return None
    tried = _TRIED.search(text)
    more = f": {int(tried[1]) // MIB + 1} MiB more were needed" if tried else ""
    held = _held()
    had = f", beside the {held // MIB} MiB it had" if held is not None else ""
    hint = "use a smaller --batch-size, or a machine with more"
    return ResourceError(f"not enough memory{more}{had}", hint=hint)


def _limit() -> int | None:
    try:
        import resource
    except ImportError:  # Windows has no such limits
        return None
    soft = [resource.getrlimit(kind)[0] for kind in (resource.RLIMIT_AS, resource.RLIMIT_DATA)]
    known = [value for value in soft if value != resource.RLIM_INFINITY]
    return min(known, default=None)


def free() -> int | None:
    """Returns the bytes of memory that can be had, None where the system does not say."""
    return _kilobytes(Path("/proc/meminfo"), "MemAvailable")


def _held() -> int | None:
    return _kilobytes(Path("/proc/self/status"), "VmSize")


def _kilobytes(file: Path, name: str) -> int | None:
    try:
        found = re.search(rf"^{name}:\s+(\d+) kB", file.read_text(), re.M)
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None
