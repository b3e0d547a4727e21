"""Ridge regression from sums: the fit and its strength, chosen on rows that were not fitted on.

Calibration batches are in two parts. Either part judges what is fitted on the other (two-fold cross
validation), for each strength; with the best one the fit is made on both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""Ridge strengths tried, in shares of the mean squared feature."""

HELD_BACK = 4
"""Every fourth calibration batch is in the smaller part."""


def is_held_back(number: int) -> bool:
    """Whether batch `number` is in the smaller part: every fourth one, and the second of few."""
    return number % HELD_BACK == HELD_BACK - 1 or number == 1


class Sums:
    """`HᵀH`, `HᵀR` and `|R|²` over tokens, float64; `size` is the squared norm of the target.

    Args:
        width: features of `H`.
        outs: what is fitted, features of `R`.
    """

    def __init__(self, width: int, outs: int) -> None:
        self.gram = torch.zeros(width, width, dtype=torch.float64)
        self.cross = torch.zeros(width, outs, dtype=torch.float64)
        self.square = self.size = 0.0

    def add(self, features: Tensor, gap: Tensor, size: float) -> None:
        """Adds rows: features `[tokens, width]`, what is to be fitted `[tokens, outs]`."""
        self.gram += features.T @ features
        self.cross += features.T @ gap
        self.square += float(gap.square().sum())
        self.size += size

    def __add__(self, other: Sums) -> Sums:
        total = Sums(0, 0)
        total.gram, total.cross = self.gram + other.gram, self.cross + other.cross
        total.square, total.size = self.square + other.square, self.size + other.size
        return total

    def error(self, change: Tensor | None) -> float:
        """Squared share of the target that is off with `change`, `[features, outs]`."""
        if change is None:
            return self.square / max(self.size, 1e-30)
        fitted = float((change * (self.gram @ change - 2 * self.cross)).sum())
        return (self.square + fitted) / max(self.size, 1e-30)


@dataclass(frozen=True, eq=False)
class RidgeFit:
    """A linear map fitted to rows in two parts.

    Attributes:
        change: `[features, outs]`, fitted to all rows.
        strength: of `STRENGTHS`.
        before: squared share of the target that is off without it.
        after: the same with it, each part with a fit to the other.
    """

    change: Tensor
    strength: float
    before: float
    after: float

    @property
    def gains(self) -> bool:
        """Whether rows that were not fitted on are nearer to the target with it."""
        return self.after < self.before


def best_fit(parts: Sequence[Sums], *, has_bias: bool) -> RidgeFit:
    """Returns the fit of the strength that is best on rows which were not fitted on.

    Args:
        parts: sums of two parts of the rows.
        has_bias: whether the last feature is a column of ones; it is as good as free.
    """
    left, right = parts
    both = left + right

    def error(strength: float) -> float:
        folds = ((left, right), (right, left))
        return sum(
            held.error(fitted(fit, strength, has_bias=has_bias)) * held.size for fit, held in folds
        )

    after, strength = min((error(strength), strength) for strength in STRENGTHS)
    change = fitted(both, strength, has_bias=has_bias)
    return RidgeFit(change, strength, both.error(None), after / max(both.size, 1e-30))


def fitted(sums: Sums, strength: float, *, has_bias: bool) -> Tensor:
    """Returns the change `[features, outs]` that fits rows best at a strength."""
    ridge = torch.ones(len(sums.gram), dtype=torch.float64)
    if has_bias:
        ridge[-1] = 1e-6
    mean = float(sums.gram.diagonal().mean())
    matrix = sums.gram + torch.diag(ridge * max(strength * mean, 1e-12))
    found: Tensor = torch.linalg.solve(matrix, sums.cross)
    return found
