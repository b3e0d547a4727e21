"""What a long run has found out so far, on the disk as soon as it is known.

A run asks for each expensive figure by name: `journal.recall(name, compute)`. A figure that an
earlier, killed run of the same work found is read back, any other is computed and appended, one
line a record with a checksum, synced before the run goes on. A run that decides by such figures
alone then repeats the decisions of the killed one and ends with the same result.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from redpass import atomic, blocks
from redpass.errors import DataError, OutputError, RedpassError, ResourceError, VerifyError
from redpass.progress import Listener

JSON = Any
"""None, a boolean, number or text, or lists and dicts (with text keys) of them."""

FORMAT = "redpass-journal-1"
MAX_BYTES = 1 << 30
TRACED = "-traced"
"""What the traced program's file beside the journals ends in."""

_OWN = re.compile(rf"-[0-9a-f]{{16}}({blocks.SUFFIX})?")

_KEPT_ERRORS: dict[str, type[RedpassError]] = {
    kind.__name__: kind for kind in (DataError, VerifyError)
}
"""Errors that are findings about a candidate: they would be raised again by the same work."""

_OF_THE_MACHINE = (OutputError, ResourceError)
"""Errors that the same command need not end in again."""


class Journal:
    """The figures of one run, in the order in which they were found.

    Without a file it remembers nothing and computes everything.

    Attributes:
        path: the file, or None.
        found: how many records were there when it was opened.
        recalled: how many figures were read back instead of being computed.
        computed: how many were computed.
        note: what to tell the user about the state the file was found in, or "".
        is_warning: whether the user may have expected something else.
        blocks: large values, kept as bytes beside the figures.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self.found = self.recalled = self.computed = 0
        self.note, self.is_warning = "", False
        self.blocks = blocks.Blocks()
        self._kept: dict[str, list[JSON]] = {}
        self._asked: dict[str, int] = defaultdict(int)

    @classmethod
    def open(cls, path: Path | None, key: str, *, fresh: bool = False) -> Journal:
        """Opens the journal of one piece of work, and makes it when it is not there.

        Each key has a file of its own, so a try with other options costs no figures. A damaged
        file, or one cut while a record was being written, counts up to the damage; `note` says so.

        Args:
            path: the stem of the file's name, in a folder that exists. None for a journal that
                remembers nothing.
            key: what identifies the work: digests of model and data, passes, options, version.
            fresh: forget what is there.

        Raises:
            OutputError: the file cannot be read or written.
        """
        if path is None:
            return cls()
        journal = cls(path.with_name(f"{path.name}-{_checksum(key)}"))
        try:
            journal._open(key, fresh)
        except OSError as error:
            raise _trouble(error, path) from error
        return journal

    def recall(
        self, name: str, compute: Callable[[], JSON], of: Callable[[], str] | None = None
    ) -> JSON:
        """Returns the figure called `name`: the one on record, else the one `compute` finds.

        A name may be asked for more than once; the second time stands for the second record of
        that name. Numbers come back exactly as they were, tuples as lists. A `DataError` or
        `VerifyError` of `compute` is a finding too: it is kept, and raised again.

        Args:
            of: says what the figure is of, where `name` does not; asked only when there is a file,
                as naming a program can take longer than measuring it.

        Raises:
            OutputError: the record cannot be written.
            TypeError: the figure is not made of what JSON can hold.
        """
        if of is not None and self.path is not None:
            name = f"{name}, {of()}"
        place = self._asked[name]
        self._asked[name] += 1
        kept = self._kept.get(name, ())
        if place < len(kept):
            self.recalled += 1
            return _value(kept[place])
        text = json.dumps(_attempt(name, compute))
        if self.path is not None:
            _append(self.path, text)
        self.computed += 1
        return _value(json.loads(text))

    def remove(self) -> None:
        """Removes the file, as its run has come to an end, and those of other keys beside it."""
        if self.path is not None:
            remove_all(self.path.with_name(self.path.name.rpartition("-")[0]))

    def remove_if_empty(self) -> None:
        """Removes a file that holds nothing worth coming back to."""
        if self.path is not None and not self.found and not self.computed:
            self.path.unlink(missing_ok=True)
            self.blocks.remove()

    def _open(self, key: str, fresh: bool) -> None:
        assert self.path is not None
        head = {"format": FORMAT, "key": key}
        records, length = _read(self.path)
        size = self.path.stat().st_size if records else 0
        resumes = records[:1] == [head] and not fresh
        self.note = _note(len(records) - 1, fresh=fresh, damaged=length < size)
        self.is_warning = not resumes or length < size
        self.blocks = blocks.Blocks.beside(self.path, key, fresh=not resumes)
        if not resumes:
            self.path.unlink(missing_ok=True)
            _append(self.path, json.dumps(head))
            atomic.sync(self.path.parent)
            return
        os.truncate(self.path, length)
        for record in records[1:]:
            self._kept.setdefault(record["name"], []).append(record)
        self.found = len(records) - 1


@contextlib.contextmanager
def kept_until_done(journal: Journal, listener: Listener) -> Iterator[None]:
    """Tells what the journal was opened with, and removes it where there is nothing to resume.

    That is after an error that the same command would end in again (a budget that cannot be met,
    say), and before the first figure; what ends the block otherwise (a signal, a full disk, a lack
    of memory, a fault) leaves the records for the next run, and carries a note that says so.
    """
    if journal.note and journal.is_warning:
        warnings.warn(journal.note, stacklevel=1)
    elif journal.note:
        listener.message(journal.note)
    try:
        yield
    except BaseException as error:
        if isinstance(error, RedpassError) and not isinstance(error, _OF_THE_MACHINE):
            journal.remove()
            raise
        journal.remove_if_empty()
        if journal.path is not None and journal.found + journal.computed:
            error.add_note("what was measured is kept: run the same command with --resume")
        raise


@contextlib.contextmanager
def cleared_when_done(path: Path) -> Iterator[None]:
    """Removes at the end what a run kept at the stem `path`, unless it failed and has figures."""
    try:
        yield
    except BaseException:
        if not _all(path):
            remove_all(path)
        raise
    remove_all(path)


def traced_of(path: Path) -> Path:
    """Returns the file at the stem `path` that keeps the traced program."""
    return path.with_name(f"{path.name}{TRACED}")


def remove_all(path: Path) -> None:
    """Removes the journals of every key at the stem `path`, and the traced program.

    What cannot be removed stays: a folder that is none, or cannot be written, holds no such file.
    """
    for file in (*_all(path), traced_of(path)):
        with contextlib.suppress(OSError):
            file.unlink()


def _all(path: Path) -> list[Path]:
    if not path.parent.is_dir():
        return []
    found = (file for file in path.parent.iterdir() if file.name.startswith(path.name))
    return [file for file in found if _OWN.fullmatch(file.name.removeprefix(path.name))]


def _append(path: Path, text: str) -> None:
    try:
        atomic.append(path, f"{_checksum(text)} {text}\n")
    except OSError as error:
        raise _trouble(error, path) from error


def _attempt(name: str, compute: Callable[[], JSON]) -> dict[str, JSON]:
    try:
        return {"name": name, "value": compute()}
    except tuple(_KEPT_ERRORS.values()) as error:
        told = {"found": error.found, "file": error.file, "place": error.place, "hint": error.hint}
        return {"name": name, "error": [type(error).__name__, told]}


def _value(record: dict[str, JSON]) -> JSON:
    if "error" in record:
        kind, told = record["error"]
        raise _KEPT_ERRORS[kind](**told)
    return record["value"]


def _read(path: Path) -> tuple[list[JSON], int]:
    """Returns the records before the first damage, and how many bytes they take."""
    try:
        number = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0))
    except FileNotFoundError:
        return [], 0
    with os.fdopen(number, "rb") as file:
        lines = file.read(MAX_BYTES).splitlines(keepends=True)
    records: list[JSON] = []
    for line in lines:
        record = _parse(line, is_first=not records)
        if record is None:
            break
        records.append(record)
    return records, sum(map(len, lines[: len(records)]))


def _parse(line: bytes, *, is_first: bool) -> JSON | None:
    """Returns the record on a line, None when it is damaged or no record."""
    try:
        checksum, _, text = line.decode().partition(" ")
        if not text.endswith("\n") or checksum != _checksum(text[:-1]):
            return None
        record = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return record if is_first or _is_record(record) else None


def _is_record(record: JSON) -> bool:
    if not isinstance(record, dict) or not isinstance(record.get("name"), str):
        return False
    if "error" not in record:
        return "value" in record
    try:
        _value(record)
    except tuple(_KEPT_ERRORS.values()):
        return True
    except (TypeError, ValueError, KeyError):
        return False
    return False


def _checksum(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _note(count: int, *, fresh: bool, damaged: bool) -> str:
    if fresh:
        text = f"{count} measurements of an interrupted run are dropped, as --resume was not given"
        return text if count > 0 else ""
    if count < 0:
        return "nothing to resume: no interrupted run of this model, data and options"
    text = f"an interrupted run goes on after {count} measurements"
    return f"{text}; its journal was damaged behind them" if damaged else text


def _trouble(error: OSError, path: Path) -> OutputError:
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    text = (
        "the disk is full"
        if full
        else f"the journal cannot be kept: {os.strerror(error.errno or 0)}"
    )
    return OutputError(text, file=path, hint="free some space or choose another --out")
