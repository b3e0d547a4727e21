"""Large values that a long run computed, as bytes beside its journal.

One file that is added to: a line of JSON (digest of the value's name, what the caller says about
it, length, SHA-256 of all three), then the bytes. A value is used when it is whole. None of them is
needed: what is damaged, too large or cannot be written is computed again, so nothing here waits for
the disk.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import shutil
from pathlib import Path
from typing import Any, NamedTuple

from redpass import atomic

JSON = Any

LARGEST, SHARE = 1 << 30, 10
"""Bytes of values that are kept, and which part of the disk's free space one may take."""

SUFFIX = "-blocks"
"""What the file's name has behind the journal's."""

_LONGEST_LINE = 1 << 12


class _Place(NamedTuple):
    start: int
    length: int
    sha256: str
    about: JSON


class Blocks:
    """Bytes by name. Without a path it keeps nothing.

    Args:
        path: the file, in a folder that exists.
        key: what the values follow from; those kept under another key are not found.
        fresh: forget what is there.
    """

    def __init__(self, path: Path | None = None, key: str = "", *, fresh: bool = True) -> None:
        self.path, self._key = path, key
        self._places: dict[str, _Place] = {}
        self._end = 0
        if path is not None and fresh:
            self.remove()
        elif path is not None:
            self._read()

    @staticmethod
    def beside(journal: Path, key: str, *, fresh: bool) -> Blocks:
        """Opens the file beside a journal's."""
        return Blocks(journal.with_name(f"{journal.name}{SUFFIX}"), key, fresh=fresh)

    def find(self, name: str) -> tuple[JSON, bytearray] | None:
        """Returns what was said about the value called `name`, and its bytes; None if not kept."""
        digest = self._digest(name)
        place = self._places.get(digest)
        if place is None or self.path is None:
            return None
        with contextlib.suppress(OSError), _open(self.path) as file:
            file.seek(place.start)
            data = bytearray(place.length)
            whole = file.readinto(data) == place.length
            if whole and _total(digest, place.about, data) == place.sha256:
                return place.about, data
        return None

    def keep(self, name: str, about: JSON, data: memoryview) -> None:
        """Keeps the bytes `data` under `name`, if the disk has room; `about` is plain and short."""
        if self.path is None or not self._has_room(data.nbytes):
            return
        digest = self._digest(name)
        total = _total(digest, about, data)
        head = {"name": digest, "about": about, "bytes": data.nbytes, "sha256": total}
        line = json.dumps(head) + "\n"
        try:
            atomic.append(self.path, line, data, wait=False)
        except OSError:
            self.remove()
            self.path = None
            return
        start = self._end + len(line)
        self._places[digest] = _Place(start, data.nbytes, total, about)
        self._end = start + data.nbytes

    def remove(self) -> None:
        """Removes the file."""
        if self.path is not None:
            with contextlib.suppress(OSError):
                self.path.unlink()

    def _has_room(self, size: int) -> bool:
        assert self.path is not None
        if self._end + size > LARGEST:
            return False
        try:
            return size <= shutil.disk_usage(self.path.parent).free // SHARE
        except OSError:
            return False

    def _digest(self, name: str) -> str:
        return hashlib.sha256(f"{self._key}\n{name}".encode()).hexdigest()

    def _read(self) -> None:
        """Notes where whole values lie, and cuts off what lies behind the first damage."""
        assert self.path is not None
        try:
            with _open(self.path) as file:
                self._find_places(file)
            os.truncate(self.path, self._end)
        except FileNotFoundError:
            return
        except OSError:
            self.path = None

    def _find_places(self, file: io.BufferedReader) -> None:
        size = os.fstat(file.fileno()).st_size
        while line := file.readline(_LONGEST_LINE):
            try:
                name, place = _parse(line, file.tell())
            except (ValueError, RecursionError):
                return
            if place.start + place.length > size:
                return
            self._places[name] = place
            self._end = file.seek(place.start + place.length)


def _total(digest: str, about: JSON, data: memoryview | bytearray) -> str:
    """SHA-256 over a value's name, what is said about it, and its bytes."""
    total = hashlib.sha256(f"{digest}\n{json.dumps(about)}\n".encode())
    total.update(data)
    return total.hexdigest()


def _parse(line: bytes, start: int) -> tuple[str, _Place]:
    """Raises ValueError when the line says nothing that can be used."""
    head = json.loads(line)
    try:
        name, length, total = head["name"], head["bytes"], head["sha256"]
        about = head["about"]
    except (KeyError, TypeError) as error:
        raise ValueError("no head of a value") from error
    texts = isinstance(name, str) and isinstance(total, str)
    if not texts or type(length) is not int or not 0 <= length <= LARGEST:
        raise ValueError("no head of a value")
    return name, _Place(start, length, total, about)


def _open(path: Path) -> io.BufferedReader:
    return os.fdopen(os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0)), "rb")
