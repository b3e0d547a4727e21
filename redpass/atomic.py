"""Renames that happen at one instant, and the lock that says who is writing where.

Linux swaps two names in one call (`renameat2`); elsewhere the old name is moved aside first, and
`restore` puts it back when a run died between the two moves.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import io
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from redpass.errors import OutputError

try:
    import fcntl
except ImportError:  # Windows: leftovers are then told from live runs by their process id alone
    fcntl = None  # type: ignore[assignment]

_AT_FDCWD = -100
_NOREPLACE, _EXCHANGE = 1, 2
_UNSUPPORTED = {errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP}


def move_in(source: Path, target: Path) -> None:
    """Renames `source` to `target`, which must not exist. Raises FileExistsError when it does."""
    if _renameat2(source, target, _NOREPLACE):
        return
    if os.path.lexists(target):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
    os.rename(source, target)


def swap(new: Path, target: Path, aside: Path) -> Path:
    """Puts `new` at `target`, which exists, and returns where the old content now lies.

    Args:
        aside: a free name on the same filesystem for the old content, used where two names
            cannot be swapped in one call.
    """
    if _renameat2(new, target, _EXCHANGE):
        return new
    os.rename(target, aside)
    try:
        os.rename(new, target)
    except BaseException:
        os.rename(aside, target)
        raise
    return aside


def restore(target: Path, aside: Path) -> None:
    """Puts content that a dead run had moved aside back, when nothing took its place."""
    if not os.path.lexists(target):
        os.rename(aside, target)


def sync(path: Path) -> None:
    """Waits until the file or folder at `path` is on the disk."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    except OSError as error:
        # Some network filesystems cannot sync a folder; a file must always succeed.
        if not path.is_dir() or error.errno not in _UNSUPPORTED:
            raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        os.close(number)


def write(path: Path, text: str) -> None:
    """Writes a new small file and waits until it is on the disk. Raises OSError, file named."""
    number = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    rest = memoryview(text.encode())
    try:
        while rest:
            rest = rest[os.write(number, rest) :]
        os.fsync(number)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        os.close(number)


def append(path: Path, text: str, data: memoryview | None = None, *, wait: bool = True) -> None:
    """Adds `text`, and `data` behind it, to a file, which is made when missing.

    What a failed call added is taken back, so the file never ends in half of it but by a death.

    Args:
        wait: until it is on the disk.

    Raises:
        OSError: the disk is full or fails, or `path` is a link.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | getattr(os, "O_NOFOLLOW", 0)
    number = os.open(path, flags, 0o666)
    try:
        before = os.fstat(number).st_size
        try:
            for rest in (memoryview(text.encode()), data):
                while rest:
                    rest = rest[os.write(number, rest) :]
            if wait:
                os.fsync(number)
        except OSError:
            os.ftruncate(number, before)
            raise
    finally:
        os.close(number)


@contextlib.contextmanager
def steady(path: Path) -> Iterator[io.RawIOBase]:
    """Yields a file for native writers that end the process when a write fails.

    The first failure is kept and what follows is thrown away, so the writer comes to its end.

    Raises:
        OSError: at the end of the block, the failure that was kept, with the file named.
    """
    with open(path, "wb", buffering=0) as file:
        steady_file = _Steady(file)
        yield steady_file
        if steady_file.failure is not None:
            error = steady_file.failure
            raise OSError(error.errno, error.strerror, str(path)) from error


class _Steady(io.RawIOBase):
    def __init__(self, file: io.FileIO) -> None:
        self.file, self.place = file, 0
        self.failure: OSError | None = None

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True  # torch asks for it, but only rewinds when all is written

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        if (offset, whence) != (0, os.SEEK_SET):
            raise io.UnsupportedOperation("this file is written from its start to its end")
        return 0

    def tell(self) -> int:
        return self.place

    def write(self, data: Any) -> int:
        rest = memoryview(data).cast("B")
        self.place += len(rest)
        size = len(rest)
        try:
            while rest and self.failure is None:
                rest = rest[self.file.write(rest) :]
        except OSError as error:
            self.failure = error
        return size


@contextlib.contextmanager
def lock(path: Path, target: Path) -> Iterator[bool]:
    """Holds the lock file at `path` while writing to `target`; it goes with the process.

    Yields:
        Whether the lock is held: False where the system or the filesystem has no locks.

    Raises:
        OutputError: another live process is writing to `target`.
    """
    number, held = _open_locked(path, target)
    try:
        yield held
    finally:
        # Removed while still locked, so nobody can hold a lock on a name that is gone.
        with contextlib.suppress(OSError):
            os.unlink(path)
        os.close(number)


def _open_locked(path: Path, target: Path) -> tuple[int, bool]:
    while True:
        number = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            held = _take(number, target)
            if _is_same(number, path):
                return number, held
        except BaseException:
            os.close(number)
            raise
        os.close(number)  # the last owner removed the name between our open and our lock


def _take(number: int, target: Path) -> bool:
    if fcntl is None:
        return False
    try:
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        hint = "wait for it to end, or choose another --out"
        raise OutputError("another run is writing here", file=target, hint=hint) from None
    except OSError as error:
        if error.errno not in _UNSUPPORTED | {errno.ENOLCK}:
            raise
        return False


def _is_same(number: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(number), os.stat(path))
    except FileNotFoundError:
        return False


def _renameat2(source: Path, target: Path, flags: int) -> bool:
    """Returns whether the kernel did the rename; False where it knows no such call or flag."""
    call = _system_call()
    if call is None:
        return False
    if call(_AT_FDCWD, os.fsencode(source), _AT_FDCWD, os.fsencode(target), flags) == 0:
        return True
    number = ctypes.get_errno()
    if number in _UNSUPPORTED:
        return False
    raise OSError(number, os.strerror(number), str(target))


@functools.cache
def _system_call() -> Callable[..., int] | None:
    try:
        call = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError, TypeError):
        return None
    call.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint]
    call.restype = ctypes.c_int
    return call  # type: ignore[no-any-return]
