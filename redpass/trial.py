"""A first reading of a checked `.pt2` where it can do no harm: in a child, under limits.

One helper process is started at the first use and imports PyTorch once; for each archive that comes
through its pipe it forks a worker, which sets limits on itself and gives the archive to
`torch.export.load`. The answer is one line of JSON: empty, or what went wrong in words. A worker
may write no large file, and whatever happens in it ends with it.

Where processes cannot fork or have no such limits, the helper reads the file itself, and only
the time is bounded.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import json
import os
import re
import select
import struct
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any, BinaryIO

from redpass.errors import LoadError

MEMORY, MEMORY_PER_BYTE = 1 << 30, 4
"""Bytes of address space a worker may take beyond what PyTorch itself has, and for each byte."""

SECONDS, SECONDS_PER_MIB = 8, 0.5
"""Processor time a worker may take, and more for each MiB of the file."""

PATIENCE = 120
"""Seconds of waiting beyond ten times the processor time: for a machine that is busy."""

MAX_ANSWER = 4096
_CODE = "import sys; sys.path[:] = {path!r}; from redpass import trial; trial.serve()"
_NEEDED = ("torch.export.pt2_archive._package", "torch.export._trace", "sympy.tensor.tensor")
"""What `torch.export.load` imports when it runs: loaded once here, not by every worker."""

_LOCK = threading.Lock()
_HEAD = struct.Struct(">Q")


def check(archive: memoryview, file: Path) -> None:
    """Has a child read `archive`. Raises `LoadError` for `file` unless that went well."""
    limit = SECONDS + SECONDS_PER_MIB * len(archive) / 2**20
    with _LOCK:
        try:
            fault = _Helper.current().ask(archive, 10 * limit + PATIENCE)
        except OSError as error:
            _Helper.drop()
            raise LoadError(
                f"no process can be started that reads it first: {error}",
                file=file,
                hint="for a file you made yourself, --trust-file reads it without",
            ) from error
        if fault is None:
            _Helper.drop()
            fault = "the process that read it ended, or found no end"
        if fault:
            raise refused(fault, file)


def register_ops(archive: bytes | memoryview) -> None:
    """Makes the ops of redpass known when an archive calls one."""
    if re.search(rb"torch\.ops\.redpass\.", archive):
        from redpass.codegen import ops

        ops.register()


def refused(found: str, file: Path) -> LoadError:
    """Returns the error for a file that passed the checks and that PyTorch does not read."""
    return LoadError(
        f"torch.export.load refuses it: {found}",
        file=file,
        hint="export the model again with this version of PyTorch",
    )


class _Helper:
    """The process that reads files first; one for each process that asks."""

    _current: _Helper | None = None

    def __init__(self) -> None:
        self.owner = os.getpid()
        self.process = subprocess.Popen(
            [sys.executable, "-c", _CODE.format(path=sys.path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )

    @classmethod
    def current(cls) -> _Helper:
        """Returns the helper of this process, started when there is none."""
        if cls._current is None or cls._current.owner != os.getpid():
            cls._current = cls()
        return cls._current

    @classmethod
    def drop(cls) -> None:
        """Ends the helper; the next file gets a new one."""
        helper, cls._current = cls._current, None
        if helper is not None and helper.owner == os.getpid():
            helper.process.kill()
            helper.process.wait()
            for pipe in (helper.process.stdin, helper.process.stdout):
                with contextlib.suppress(OSError):
                    pipe.close()  # type: ignore[union-attr]  # both are pipes

    def ask(self, archive: memoryview, seconds: float) -> str | None:
        """Sends an archive; returns what went wrong with it, "", or None for no answer."""
        pipe: Any = self.process.stdin
        with contextlib.suppress(BrokenPipeError):  # the answer says why nobody reads any more
            pipe.write(_HEAD.pack(len(archive)))
            pipe.write(archive)
            pipe.flush()
        source: Any = self.process.stdout
        ready, _, _ = select.select([source], [], [], seconds)
        try:
            return str(json.loads(source.readline(MAX_ANSWER))["fault"]) if ready else None
        except (ValueError, KeyError, TypeError):
            return None


atexit.register(_Helper.drop)


def start() -> None:
    """Starts the helper ahead of the first file, so that it imports PyTorch meanwhile."""
    with _LOCK, contextlib.suppress(OSError):  # `check` says what is wrong
        _Helper.current()


def serve() -> None:
    """Reads archives from stdin until it ends and answers each on stdout; the helper's loop."""
    import torch.export

    torch.set_num_threads(1)
    for name in _NEEDED:
        with contextlib.suppress(Exception):
            importlib.import_module(name)
    out = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what libraries print is no answer
    source = os.fdopen(0, "rb", buffering=0)
    while head := _read(source, _HEAD.size):
        (size,) = _HEAD.unpack(head)
        out.write(_answered(_read(source, size)))


def _answered(archive: bytes) -> bytes:
    if not hasattr(os, "fork"):
        return _line(_tried(archive))
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.close(reader)
            _end_with_parent()
            _limit(len(archive))
            os.write(writer, _line(_tried(archive)))
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        answer = pipe.read(MAX_ANSWER)
    _, status = os.waitpid(child, 0)
    return answer or _line(_death(status))


def _death(status: int) -> str:
    import signal

    number = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
    if number in (signal.SIGXCPU, signal.SIGKILL):
        return "it takes more time or memory than its size allows"
    return f"its reader crashed (signal {number})" if number else "its reader ended early"


def _end_with_parent() -> None:
    """Has the system kill this process when the one that forked it ends, where it can do that."""
    if sys.platform == "linux":
        import ctypes
        import signal

        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # 1 is PR_SET_PDEATHSIG


def _limit(size: int) -> None:
    """Bounds what this process may take. Raises nothing where the system has no such limits."""
    try:
        import resource
    except ImportError:
        return
    pages = Path("/proc/self/statm").read_text().split()[0] if sys.platform == "linux" else "0"
    memory = int(pages) * resource.getpagesize() + MEMORY + MEMORY_PER_BYTE * size
    seconds = int(SECONDS + SECONDS_PER_MIB * size / 2**20)
    wanted = {"RLIMIT_CPU": seconds, "RLIMIT_FSIZE": 1 << 20, "RLIMIT_CORE": 0}
    if sys.platform == "linux":
        wanted["RLIMIT_AS"] = memory
    for name, value in wanted.items():
        kind = getattr(resource, name)
        _, hard = resource.getrlimit(kind)
        low = value if hard == resource.RLIM_INFINITY else min(value, hard)
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(kind, (low, low))


def _tried(archive: bytes) -> str:
    """Reads an archive and returns what went wrong, or ""."""
    import io

    import torch

    try:
        register_ops(archive)
        torch.export.load(io.BytesIO(archive))
    except BaseException as error:
        first = (str(error).strip().splitlines() or [""])[0]
        return f"{type(error).__name__}: {first[:500]}"
    return ""


def _read(source: BinaryIO, size: int) -> bytes:
    found = bytearray()
    while len(found) < size:
        part = source.read(min(size - len(found), 1 << 20))
        if not part:
            return b""
        found += part
    return bytes(found)


def _line(fault: str) -> bytes:
    return json.dumps({"fault": fault}).encode()[: MAX_ANSWER - 1] + b"\n"
