"""Figures with their errors: sums over rows turned into a mean, a difference and their spread."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Estimate:
    """A metric measured on data.

    Attributes:
        value: the metric of the program.
        stderr: its standard error over rows; NaN when the data do not say.
        count: how many tokens or rows were measured.
        original: the metric of the original program on the same data.
        difference: value minus original.
        difference_stderr: its standard error from paired rows, usually far below `stderr`: rows
            that are hard for one program are hard for the other.
    """

    value: float
    stderr: float
    count: int
    original: float = math.nan
    difference: float = math.nan
    difference_stderr: float = math.nan


@dataclass(frozen=True)
class Samples:
    """What one batch gives to a metric: per row a sum for each program, and the sum's weight.

    Attributes:
        now, was: float64 `[rows]`, sums of the program and of the original.
        weight: float64 `[rows]`, how many tokens (or 1 for a row) the sums are over.
        extra: what a summary needs beside sums, such as single tokens' values.
    """

    now: Tensor
    was: Tensor
    weight: Tensor
    extra: tuple[Tensor, ...] = ()


Summary = Callable[[list[Samples]], Estimate]


def join(samples: list[Samples]) -> Samples:
    """Returns all batches' samples as one."""
    extra = tuple(torch.cat(parts) for parts in zip(*(s.extra for s in samples), strict=True))
    now, was, weight = (
        torch.cat([getattr(s, name) for s in samples]).double() for name in ("now", "was", "weight")
    )
    return Samples(now, was, weight, extra)


def mean(samples: list[Samples]) -> Estimate:
    """Returns the weighted mean: all sums over all weights.

    Rows are the independent units, so that tokens of one text do not count as many: the standard
    error is that of a ratio of sums over rows (Cochran 1977, section 6.4).
    """
    return _ratio(join(samples), lambda value: (value, 1.0))


def exponential_mean(samples: list[Samples]) -> Estimate:
    """Returns the exponential of the weighted mean: perplexity from losses.

    The standard errors are carried through the exponential by its slope.
    """
    return _ratio(join(samples), lambda value: (_exp(value), _exp(value)))


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf


def _ratio(all_: Samples, scale: Callable[[float], tuple[float, float]]) -> Estimate:
    total = all_.weight.sum()
    now, was = (all_.now.sum() / total).item(), (all_.was.sum() / total).item()
    (value, slope), (original, old_slope) = scale(now), scale(was)
    shift = slope * (all_.now - now * all_.weight)
    old_shift = old_slope * (all_.was - was * all_.weight)
    return Estimate(
        value=value,
        stderr=_stderr(shift, total),
        count=int(total),
        original=original,
        difference=value - original,
        difference_stderr=_stderr(shift - old_shift, total),
    )


def _stderr(shift: Tensor, total: Tensor) -> float:
    rows = len(shift)
    if rows < 2:
        return math.nan
    return (shift.square().sum() * rows / (rows - 1)).sqrt().item() / total.item()


def tail(share: float) -> Summary:
    """Returns a summary that is the quantile `share` of the single tokens in `extra[0]`.

    Its standard error spans the order statistics one standard deviation of their rank apart, as
    if tokens were independent.
    """

    def summary(samples: list[Samples]) -> Estimate:
        values = join(samples).extra[0].double().sort().values
        count = len(values)
        spread = math.sqrt(share * (1 - share) / count)
        value = _quantile(values, share)
        low, high = _quantile(values, share - spread), _quantile(values, share + spread)
        return Estimate(value, (high - low) / 2, count, 0.0, value, (high - low) / 2)

    return summary


def _quantile(ordered: Tensor, share: float) -> float:
    """Interpolates linearly between order statistics, as NumPy's default does."""
    place = min(max(share, 0.0), 1.0) * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    step = place - low
    if step == 0:
        return ordered[low].item()
    return (ordered[low] * (1 - step) + ordered[high] * step).item()
