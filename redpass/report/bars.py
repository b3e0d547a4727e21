"""Bar charts: the influence of layers, and of branches by kind, one group of bars a layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from redpass.record import BranchRecord, LayerRecord, RunRecord
from redpass.report.scales import Scale, scale

HEIGHT, LEFT, TOP, GAP = 180, 52, 8, 6


@dataclass(frozen=True)
class Bar:
    """One bar in drawing units, its series (a colour), and what it tells on hover."""

    x: float
    y: float
    width: float
    height: float
    series: int
    title: str


@dataclass(frozen=True)
class Tick:
    """A line across the chart, or a label under it."""

    at: float
    text: str
    is_removed: bool = False


@dataclass(frozen=True)
class BarChart:
    """All parts of one drawing.

    Attributes:
        series: what the colours stand for.
        lines: ticks of the y axis; `groups`: labels of the x axis.
    """

    title: str
    y_title: str
    series: list[str]
    bars: list[Bar]
    lines: list[Tick]
    groups: list[Tick]
    width: float
    height: float = HEIGHT
    left: float = LEFT
    top: float = TOP


def bar_charts(record: RunRecord) -> list[BarChart]:
    """Returns the influence of layers and of branches, of what was measured."""
    charts = [_layers(record.layers), _branches(record.branches, record.layers)]
    return [chart for chart in charts if chart is not None]


def _layers(layers: Sequence[LayerRecord]) -> BarChart | None:
    series = {
        "block influence": [_figure(layer.influence) for layer in layers],
        "macro influence": [_figure(layer.macro_influence) for layer in layers],
    }
    gone = {layer.label for layer in layers if layer.outcome == "dropped"}
    return _chart("Influence of layers", [layer.label for layer in layers], series, gone)


def _branches(branches: Sequence[BranchRecord], layers: Sequence[LayerRecord]) -> BarChart | None:
    kinds = list(dict.fromkeys(branch.kind for branch in branches))
    groups = {layer.label: layer.branches for layer in layers}
    rows = {branch.label: branch for branch in branches}
    series: dict[str, list[float]] = {kind: [] for kind in kinds}
    for labels in groups.values():
        found = {rows[label].kind: rows[label].similarity for label in labels if label in rows}
        for kind in kinds:
            series[kind].append(1.0 - _figure(found.get(kind)))
    gone = {layer.label for layer in layers if layer.outcome == "dropped"}
    return _chart("Influence of branches", list(groups), series, gone)


def _chart(
    title: str, groups: list[str], series: dict[str, list[float]], gone: set[str]
) -> BarChart | None:
    known = {name: values for name, values in series.items() if any(map(math.isfinite, values))}
    if not known:
        return None
    axis = scale((v for values in known.values() for v in values), with_zero=True)
    wide = max(10.0 * len(known) + GAP, min(34.0, 620 / len(groups)))
    bars = [
        _bar(axis, LEFT + wide * place + GAP / 2, (wide - GAP) / len(known), number, value, label)
        for number, (name, values) in enumerate(known.items())
        for place, value in enumerate(values)
        if math.isfinite(value)
        for label in [f"{groups[place]}, {name}: {value:.4g}"]
    ]
    step = max(1, math.ceil(len(groups) / 64))
    names = [
        Tick(LEFT + wide * (place + 0.5), label if not place % step else "", label in gone)
        for place, label in enumerate(groups)
    ]
    lines = [Tick(TOP + HEIGHT * (1 - axis.place(tick)), f"{tick:,g}") for tick in axis.ticks]
    words = "1 - cosine (log scale)" if axis.is_log else "1 - cosine"
    return BarChart(title, words, list(known), bars, lines, names, LEFT + wide * len(groups))


def _bar(axis: Scale, x: float, width: float, number: int, value: float, title: str) -> Bar:
    top = axis.place(value)
    foot = 0.0 if axis.is_log else axis.place(0.0)
    low, high = min(top, foot), max(top, foot)
    height = max(HEIGHT * (high - low), 1.0)  # a bar of nothing still shows where it is
    return Bar(x + width * number, TOP + HEIGHT * (1 - low) - height, width, height, number, title)


def _figure(value: float | None) -> float:
    """A figure that was not measured is not a number."""
    return math.nan if value is None else value
