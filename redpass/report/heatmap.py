"""Heat maps as SVG parts: a labelled matrix becomes strips of equal colour."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass

from redpass.record import Matrix

LEVELS = 16
MOST_TITLES = 40
"""Up to this many labels each cell is drawn by itself and tells its figure on hover."""

_ANCHORS = ((31, 30, 68), (49, 92, 148), (66, 160, 150), (174, 209, 108), (250, 236, 160))
"""Colours from low to high; lightness rises evenly, so the map reads in grey and in both themes."""


@dataclass(frozen=True)
class Strip:
    """Cells of one colour, as an SVG path in units of one cell; `title` for a single cell."""

    level: int
    path: str
    title: str = ""


@dataclass(frozen=True)
class Label:
    """One row and column of the map; `is_removed` marks a place that is gone from the result."""

    text: str
    is_removed: bool
    is_shown: bool


@dataclass(frozen=True)
class HeatMap:
    """All parts of one drawing.

    Attributes:
        rows, columns: their labels.
        colors: one CSS colour a level, low to high.
        matrix: what is drawn: title, axis titles, note, the figures at the ends of the scale.
    """

    rows: list[Label]
    columns: list[Label]
    strips: list[Strip]
    colors: list[str]
    matrix: Matrix


def heat_map(matrix: Matrix, removed: Collection[str] = ()) -> HeatMap:
    """Returns the drawing of a matrix.

    Args:
        removed: labels (without a leading `after `) of the places that are gone.
    """
    rows = _labels(matrix.labels, removed)
    columns = _labels(matrix.columns or matrix.labels, removed)
    is_small = max(len(rows), len(columns)) <= MOST_TITLES
    strips = _cells(matrix) if is_small else _runs(levels(matrix))
    return HeatMap(rows, columns, strips, colors(matrix.alike), matrix)


def _labels(texts: list[str], removed: Collection[str]) -> list[Label]:
    step = max(1, math.ceil(len(texts) / 64))
    names = [text.removeprefix("after ") for text in texts]
    return [Label(name, name in removed, not i % step) for i, name in enumerate(names)]


def levels(matrix: Matrix) -> list[list[int]]:
    """Returns the colour of every cell, -1 for a figure that was not measured."""
    return [[_level(value, matrix) for value in row] for row in matrix.values]


def colors(alike: str = "high") -> list[str]:
    """Returns one CSS colour a level, low to high; the end that says `alike` is light."""
    found = [_color(level / (LEVELS - 1)) for level in range(LEVELS)]
    return found if alike == "high" else found[::-1]


def _cells(matrix: Matrix) -> list[Strip]:
    rows = [text.removeprefix("after ") for text in matrix.labels]
    columns = [text.removeprefix("after ") for text in matrix.columns or matrix.labels]
    if matrix.columns:
        rows = [f"{text} {matrix.y_title}" for text in rows]
        columns = [f"from {text}" for text in columns]
    return [
        Strip(level, f"M{x} {y}h1v1h-1z", f"{rows[y]} / {columns[x]}: {matrix.values[y][x]:.4f}")
        for y, row in enumerate(levels(matrix))
        for x, level in enumerate(row)
        if level >= 0
    ]


def _runs(grid: list[list[int]]) -> list[Strip]:
    """One path a colour: a 129 x 129 map takes 16 elements and not 16641."""
    paths: dict[int, list[str]] = {}
    for y, row in enumerate(grid):
        start = 0
        for x in range(1, len(row) + 1):
            if x == len(row) or row[x] != row[start]:
                paths.setdefault(row[start], []).append(f"M{start} {y}h{x - start}v1h{start - x}z")
                start = x
    return [Strip(level, "".join(parts)) for level, parts in sorted(paths.items()) if level >= 0]


def _level(value: float | None, matrix: Matrix) -> int:
    if value is None or not math.isfinite(value):
        return -1
    span = matrix.high - matrix.low
    share = (value - matrix.low) / span if span > 0 else 1.0
    return min(LEVELS - 1, max(0, int(share * LEVELS)))


def _color(share: float) -> str:
    place = share * (len(_ANCHORS) - 1)
    index = min(int(place), len(_ANCHORS) - 2)
    rest = place - index
    mixed = (
        round(a + (b - a) * rest) for a, b in zip(_ANCHORS[index], _ANCHORS[index + 1], strict=True)
    )
    return "#" + "".join(f"{part:02x}" for part in mixed)
