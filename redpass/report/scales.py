"""Scales of axes: round ticks on a linear or logarithmic axis, and places between 0 and 1."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

WIDE = 30.0
"""Figures above zero that span more than this factor get a logarithmic axis."""


@dataclass(frozen=True)
class Scale:
    """One axis.

    Attributes:
        low, high: the figures at its ends.
        ticks: where to draw lines.
        is_log: whether equal factors are equally long.
    """

    low: float
    high: float
    ticks: tuple[float, ...]
    is_log: bool = False

    def place(self, value: float) -> float:
        """Returns where a figure lies, 0 at the low end and 1 at the high one; ends hold."""
        if self.is_log:
            low, high = math.log(self.low), math.log(self.high)
            share = (math.log(max(value, self.low)) - low) / (high - low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return min(1.0, max(0.0, share))


def scale(values: Iterable[float], *, with_zero: bool = False, is_share: bool = False) -> Scale:
    """Returns an axis that holds all finite values; logarithmic when they span a wide range.

    Args:
        with_zero: bars start at zero unless the axis is logarithmic.
        is_share: shares of a whole are never logarithmic.
    """
    known = [value for value in values if math.isfinite(value)] or [0.0, 1.0]
    positive = [value for value in known if value > 0]
    is_wide = bool(positive) and max(positive) > WIDE * min(positive)
    if min(known) >= 0 and is_wide and not is_share:
        return _log(min(positive), max(positive))
    low = min(0.0, *known) if with_zero else min(known)
    return _linear(low, max(known))


def _linear(low: float, high: float) -> Scale:
    if high - low < 1e-12 * max(abs(low), abs(high), 1e-300):
        low, high = low - 0.5 * (abs(low) or 1.0), high + 0.5 * (abs(high) or 1.0)
    rough = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1.0, 2.0, 5.0, 10.0) if factor * power >= rough)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    ticks = tuple(number * step for number in range(first, last + 1))
    return Scale(ticks[0], ticks[-1], ticks)


def _log(low: float, high: float) -> Scale:
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    last = max(last, first + 1)
    every = math.ceil((last - first) / 6)
    ticks = tuple(10.0**power for power in range(first, last + 1, every))
    return Scale(10.0**first, 10.0**last, ticks, is_log=True)
