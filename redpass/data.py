"""Batches of example inputs: what calibration, choosing and reporting run on."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from redpass.errors import DataError

Batch = Mapping[str, Tensor]
"""Input name -> tensor; labels, where there are any, under `labels` (an extra, not an input)."""

LABELS = "labels"


@dataclass(frozen=True)
class Batches(Sequence[Batch]):
    """An immutable sequence of batches.

    Args:
        items: the batches; every one has the same names.
        source: where they came from, for messages.
    """

    items: tuple[Batch, ...]
    source: str = "data"

    def __post_init__(self) -> None:
        if not self.items:
            raise DataError("no rows", file=self.source, hint="give at least one row of data")
        for number, batch in enumerate(self.items):
            _check_finite(batch, number, self.source)

    def __len__(self) -> int:
        return len(self.items)

    def __iter__(self) -> Iterator[Batch]:
        return iter(self.items)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return Batches(self.items[index], self.source)
        return self.items[index]

    def digest(self) -> str:
        """SHA-256 over names and contents, hex."""
        total = hashlib.sha256()
        for batch in self.items:
            for name in sorted(batch):
                total.update(name.encode())
                total.update(batch[name].contiguous().view(torch.uint8).numpy().tobytes())
        return total.hexdigest()


@dataclass(frozen=True)
class Splits:
    """Disjoint data: `calibration` feeds statistics, `choosing` decides, `reporting` reports."""

    calibration: Batches
    choosing: Batches
    reporting: Batches

    def __post_init__(self) -> None:
        parts = {
            "calibration": self.calibration,
            "choosing": self.choosing,
            "reporting": self.reporting,
        }
        seen: dict[str, str] = {}
        for name, part in parts.items():
            for batch in part:
                for row in row_digests(batch):
                    if seen.setdefault(row, name) != name:
                        raise DataError(
                            f"the same row is in '{seen[row]}' and '{name}'",
                            file=part.source,
                            hint="split the data so that no row is in two parts",
                        )


def split(batches: Batches) -> Splits:
    """Splits batches into calibration (half), choosing (a quarter) and reporting (a quarter).

    Batches are dealt in turn (1st to calibration, 2nd to choosing, 3rd to calibration, 4th to
    reporting), so that an ordered file does not give three different kinds of text.

    Raises:
        DataError: fewer than four batches, or equal rows in two parts.
    """
    if len(batches) < 4:
        raise DataError(
            f"{len(batches)} batches cannot be split in calibration, choosing and reporting",
            file=batches.source,
            hint="give more rows, or a smaller --batch-size",
        )
    items, source = batches.items, batches.source
    calibration = tuple(b for i, b in enumerate(items) if i % 4 in (0, 2))
    choosing = tuple(b for i, b in enumerate(items) if i % 4 == 1)
    reporting = tuple(b for i, b in enumerate(items) if i % 4 == 3)
    return Splits(
        Batches(calibration, source), Batches(choosing, source), Batches(reporting, source)
    )


def row_digests(batch: Batch) -> list[str]:
    """Returns one digest a row (index of the first dimension) over all of the row's inputs.

    Labels are left out: a row is the same row whatever it is said to be.
    """
    names = sorted(name for name in batch if batch[name].dim() > 0 and name != LABELS)
    rows = batch[names[0]].shape[0] if names else 0
    digests = []
    for row in range(rows):
        total = hashlib.sha256()
        for name in names:
            if batch[name].shape[0] == rows:
                value = batch[name][row].contiguous().reshape(-1)
                total.update(value.view(torch.uint8).numpy().tobytes())
        digests.append(total.hexdigest())
    return digests


def refuse_short_rows(batches: Batches) -> None:
    """Raises `DataError` at the first row of less than two tokens.

    A language model says nothing of the first token of a row: such a row measures nothing, and
    its statistics are those of a first token alone.
    """
    for number, batch in enumerate(batches):
        tokens = batch.get("input_ids")
        if tokens is None or tokens.dim() != 2:
            continue
        mask = batch.get("attention_mask", torch.ones_like(tokens))
        lengths = (mask != 0).sum(dim=1)
        if int(lengths.min()) < 2:
            raise DataError(
                f"a row of {int(lengths.min())} token(s), at least 2 are needed",
                file=batches.source,
                place=f"batch {number}, row {int(lengths.argmin())}",
                hint="leave out the rows that are that short",
            )


def _check_finite(batch: Batch, number: int, source: str) -> None:
    for name, value in batch.items():
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise DataError(
                "holds NaN or infinity",
                file=source,
                place=f"batch {number}, input '{name}'",
                hint="leave out the rows that hold it",
            )
