"""How long work tells whoever is watching what it does. The library never prints."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol, TypeVar

T = TypeVar("T")


class Listener(Protocol):
    """Receives progress. Stages may nest; `total` is None when it is not known beforehand."""

    def start(self, stage: str, total: int | None = None) -> None:
        """A stage begins."""

    def advance(self, stage: str, note: str = "") -> None:
        """One unit of a stage is done."""

    def finish(self, stage: str) -> None:
        """A stage is over."""

    def message(self, text: str) -> None:
        """Something worth a line: an acceptance, a rollback, a warning."""


class Silent:
    """A listener that hears nothing."""

    def start(self, stage: str, total: int | None = None) -> None:
        """Ignores it."""

    def advance(self, stage: str, note: str = "") -> None:
        """Ignores it."""

    def finish(self, stage: str) -> None:
        """Ignores it."""

    def message(self, text: str) -> None:
        """Ignores it."""


def track(items: Iterable[T], listener: Listener, stage: str, total: int | None) -> Iterator[T]:
    """Yields `items`, telling `listener` of each one that was worked off."""
    listener.start(stage, total)
    try:
        for item in items:
            yield item
            listener.advance(stage)
    finally:
        listener.finish(stage)
