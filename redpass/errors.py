"""Every error redpass raises on purpose: one tree, one form, one exit code by kind.

A message says where (file, place inside it), what was found, and what to do next. Text that
comes from a file is escaped and cut, so a crafted name cannot draw on the user's terminal.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

MAX_TEXT = 200


def clean(text: object, limit: int = MAX_TEXT) -> str:
    """Returns `text` with control characters escaped and anything past `limit` characters cut."""
    shown = "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(text))
    return shown if len(shown) <= limit else shown[: limit - 3] + "..."


def clean_line(text: str) -> str:
    """Returns one line of a hint, cleaned."""
    return clean(text, 2000)


def nearest(word: str, known: Iterable[str]) -> str:
    """Returns a hint that names the known word nearest to `word`, and all of them when few."""
    names = sorted(known)
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.5)
    if close:
        return f"did you mean '{close[0]}'?"
    return "known: " + ", ".join(names)


class RedpassError(Exception):
    """Base of all errors raised on purpose.

    Args:
        found: what was found, in one sentence without a final stop.
        file: the file or folder concerned, if any.
        place: the tensor, node, archive member or option concerned, if any.
        hint: what to do next.
    """

    code = "error"
    exit_code = 1

    def __init__(
        self,
        found: str,
        *,
        file: object | None = None,
        place: object | None = None,
        hint: str | None = None,
    ) -> None:
        self.found = clean(found, 2000)
        self.file = None if file is None else clean(file)
        self.place = None if place is None else clean(place)
        self.hint = None if hint is None else "\n".join(map(clean_line, hint.split("\n")))
        super().__init__(str(self))

    def __str__(self) -> str:
        where = ": ".join(part for part in (self.file, self.place) if part)
        text = f"{where}: {self.found}" if where else self.found
        return f"{text}\n  {self.hint}" if self.hint else text


class UsageError(RedpassError):
    """An option, a name or a spec that redpass does not understand."""

    code = "usage"
    exit_code = 2


class LoadError(RedpassError):
    """A model file that is missing, damaged, or refused."""

    code = "load"
    exit_code = 3


class TraceError(RedpassError):
    """A model that cannot be run on its example inputs, or cannot be traced to a graph."""

    code = "trace"
    exit_code = 4


class DataError(RedpassError):
    """Calibration or evaluation data that cannot be used."""

    code = "data"
    exit_code = 5


class VerifyError(RedpassError):
    """A rewrite that broke the graph's rules or changed the result beyond its tolerance."""

    code = "verify"
    exit_code = 6


class BudgetError(RedpassError):
    """A quality or cost budget that was not met."""

    code = "budget"
    exit_code = 7


class OutputError(RedpassError):
    """A result that cannot be written where it was asked for."""

    code = "output"
    exit_code = 8


class ExportError(RedpassError):
    """A program that a target format or runtime cannot hold."""

    code = "export"
    exit_code = 9


class ResourceError(RedpassError):
    """Memory that the work needs and that is not there."""

    code = "memory"
    exit_code = 10


class PassError(RedpassError):
    """A pass that failed inside: a fault of redpass, with a reproducer."""

    code = "pass"
    exit_code = 70
