"""Line charts: quality against the share that was removed, every method as a curve."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from redpass.record import Curve, CurvePoint
from redpass.report.bars import Tick
from redpass.report.scales import Scale, scale

WIDTH, HEIGHT, LEFT, TOP = 560, 300, 60, 10

MARKERS = ("circle", "square", "triangle", "diamond", "cross", "ring")
"""Shapes go with colours, so that nobody needs the colours."""


@dataclass(frozen=True)
class Mark:
    """One point: where, the ends of its error bar, the words on hover."""

    x: float
    y: float
    ends: tuple[float, float] | None
    title: str


@dataclass(frozen=True)
class Line:
    """One method; `marker` is one of `MARKERS`, `series` counts colours."""

    name: str
    series: int
    marker: str
    path: str
    marks: list[Mark]


@dataclass(frozen=True)
class LineChart:
    """All parts of one drawing, in its units."""

    title: str
    x_title: str
    y_title: str
    lines: list[Line]
    columns: list[Tick]
    rows: list[Tick]
    width: float = WIDTH
    height: float = HEIGHT
    left: float = LEFT
    top: float = TOP


def line_charts(curves: Iterable[Curve]) -> list[LineChart]:
    """Returns one chart for each metric and cost, the curves in the order given."""
    groups: dict[tuple[str, str], list[Curve]] = {}
    for curve in curves:
        if any(_is_finite(point.quality) for point in curve.points):
            groups.setdefault((curve.metric, curve.cost), []).append(curve)
    return [_chart(metric, cost, found) for (metric, cost), found in groups.items()]


def _chart(metric: str, cost: str, curves: Sequence[Curve]) -> LineChart:
    points = [p for curve in curves for p in curve.points if _is_finite(p.quality)]
    x = scale([0.0, *(100 * point.removed for point in points)], is_share=True)
    y = scale(end for point in points for end in _ends(point))
    better = f"{metric}, {curves[0].better} is better"
    return LineChart(
        title=f"{metric.capitalize()} against {cost} removed",
        x_title=f"{cost} removed, %",
        y_title=f"{better} (log scale)" if y.is_log else better,
        lines=[_line(number, curve, x, y) for number, curve in enumerate(curves)],
        columns=[Tick(LEFT + WIDTH * x.place(tick), f"{tick:g}") for tick in x.ticks],
        rows=[Tick(TOP + HEIGHT * (1 - y.place(tick)), f"{tick:,g}") for tick in y.ticks],
    )


def _line(number: int, curve: Curve, x: Scale, y: Scale) -> Line:
    known = [point for point in curve.points if _is_finite(point.quality)]
    marks = [_mark(curve, point, x, y) for point in sorted(known, key=lambda p: p.removed)]
    path = "M" + "L".join(f"{mark.x:.1f} {mark.y:.1f}" for mark in marks)
    return Line(curve.method, number, MARKERS[number % len(MARKERS)], path, marks)


def _mark(curve: Curve, point: CurvePoint, x: Scale, y: Scale) -> Mark:
    low, high = _ends(point)
    words = f"{curve.method}: {point.quality:.5g}"
    if high > low:
        words += f" ± {point.stderr:.2g}"
    words += f" at {100 * point.removed:.1f}% of {curve.cost} removed"
    words += f", {point.label}" if point.label else ""

    def height(value: float) -> float:
        return TOP + HEIGHT * (1 - y.place(value))

    ends = (height(low), height(high)) if high > low else None
    return Mark(LEFT + WIDTH * x.place(100 * point.removed), height(point.quality), ends, words)


def _ends(point: CurvePoint) -> tuple[float, float]:
    """The ends of the error bar; both the figure itself where the error is not known."""
    error = point.stderr if _is_finite(point.stderr) else 0.0
    return point.quality - error, point.quality + error


def _is_finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)
