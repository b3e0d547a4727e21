"""What is measured of a width before it is cut: second moments of what its readers read.

One streaming run over the calibration data for as many widths as their Gram matrices fit in
memory; a matrix grows with the square of the width. Every fourth batch is summed apart: it judges
what was fitted on the others.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from redpass.analysis.kept_sums import recalled
from redpass.analysis.observers import CrossGram, Observer, Spread
from redpass.analysis.ridge import is_held_back
from redpass.analysis.statistics import LIMIT, Statistics, footprint, room
from redpass.analysis.structure import Structure
from redpass.analysis.tokens import Tokens
from redpass.analysis.widths.narrowing import Reader, Width
from redpass.blocks import Blocks
from redpass.data import Batches
from redpass.program import Program


@dataclass(frozen=True)
class Sums:
    """`[X 1]ᵀ[X 1]` over tokens: `[features + 1, features + 1]`, float64."""

    gram: Tensor
    tokens: int

    def __add__(self, other: Sums) -> Sums:
        return Sums(self.gram + other.gram, self.tokens + other.tokens)


@dataclass(frozen=True)
class View:
    """A width as one reader sees it.

    Attributes:
        fitted: of most batches.
        held: of the batches held back, or None where there is one batch only.
        rows: the reader's matrix `[outs, features]`, the taps of a convolution as more outs.
        energy: mean squared norm per token of the value that the reader's output is part of.
    """

    reader: Reader
    fitted: Sums
    held: Sums | None
    rows: Tensor
    energy: float

    @property
    def whole(self) -> Sums:
        """Of all batches."""
        return self.fitted if self.held is None else self.fitted + self.held


def views(
    program: Program,
    found: Structure,
    places: Sequence[tuple[str, Width]],
    data: Batches,
    blocks: Blocks,
) -> Iterator[tuple[str, Width, tuple[View, ...]]]:
    """Yields each width with what its readers see, in order.

    Args:
        places: label and width.
        blocks: keeps the sums for a run that is resumed.

    Raises:
        DataError: values that are NaN or infinite (the label is named).
        UsageError: the sums of one width alone do not fit in memory.
    """
    totals = stream_totals(found)
    for group in _groups(program, places, totals):
        labels = {r.input: label for label, width in group for r in width.readers}
        observers = [o for _, width in group for o in _observers(width, totals)]
        sums = [
            None if part is None else recalled(program, observers, part, blocks, labels=labels)
            for part in fitted_and_held(data)
        ]
        for label, width in group:
            yield label, width, _views(program, width, sums, totals)


def why_not_measured(program: Program, width: Width) -> str:
    """Returns why a width's statistics cannot be had, or "". Nothing is run."""
    tokens = Tokens(program)
    for reader in width.readers:
        features = program.weights[reader.weight].shape[reader.axis]
        if tokens.width(reader.input) != features:
            return f"which axis of {reader.input} holds its units could not be told"
    size = 2 * footprint(program, _observers(width, {}))
    if size > LIMIT:
        return f"its second moments take {size / 1e9:.1f} GB, more than {LIMIT / 1e9:.1f} GB"
    return ""


def fitted_and_held(data: Batches) -> tuple[Batches, Batches | None]:
    """Returns the batches that are fitted on, and those held back; None where there is one."""
    if len(data) < 2:
        return data, None
    held = [n for n in range(len(data)) if is_held_back(n)]
    fitted = [n for n in range(len(data)) if n not in held]
    first, second = (Batches(tuple(data[n] for n in part), data.source) for part in (fitted, held))
    return first, second


def stream_totals(found: Structure) -> dict[str, str]:
    """Returns the node that ends a branch's path -> the stream's value that it is added to."""
    return {
        name: branch.join if branch.form == "post-norm" else branch.after
        for branch in found.branches
        for name in ([branch.feed_forward.down.node] if branch.feed_forward else [])
    }


def _observers(width: Width, totals: Mapping[str, str]) -> Iterator[Observer]:
    for reader in width.readers:
        yield CrossGram(reader.input, reader.input)
        yield Spread(totals.get(reader.node, reader.node))


def _groups(
    program: Program, places: Sequence[tuple[str, Width]], totals: Mapping[str, str]
) -> Iterator[list[tuple[str, Width]]]:
    """As many places at once as there is room for."""
    group: list[tuple[str, Width]] = []
    size, most = 0, room()
    for label, width in places:
        own = 2 * footprint(program, _observers(width, totals))
        if group and size + own > most:
            yield group
            group, size = [], 0
        group.append((label, width))
        size += own
    if group:
        yield group


def _views(
    program: Program,
    width: Width,
    sums: Sequence[Statistics | None],
    totals: Mapping[str, str],
) -> tuple[View, ...]:
    """One view a weight: what several layers do with a shared one is summed."""
    found: dict[str, View] = {}
    for reader in width.readers:
        view, old = _view(program, reader, sums, totals), found.get(reader.weight)
        if old is not None:
            held = old.held + view.held if old.held and view.held else None
            energy = (old.energy + view.energy) / 2
            view = View(old.reader, old.fitted + view.fitted, held, old.rows, energy)
        found[reader.weight] = view
    return tuple(found.values())


def _view(
    program: Program,
    reader: Reader,
    sums: Sequence[Statistics | None],
    totals: Mapping[str, str],
) -> View:
    gram, spread = (
        CrossGram(reader.input, reader.input),
        Spread(totals.get(reader.node, reader.node)),
    )
    fitted, held = (None if s is None else Sums(s.totals[gram], s.tokens[gram]) for s in sums)
    assert fitted is not None
    square = sum(float(s.totals[spread][1].sum()) for s in sums if s is not None)
    tokens = sum(s.tokens[spread] for s in sums if s is not None)
    weight = program.weights[reader.weight].movedim(reader.axis, -1).double()
    rows = weight.reshape(-1, weight.shape[-1])
    return View(reader, fitted, held, rows, max(square / max(tokens, 1), 1e-30))
