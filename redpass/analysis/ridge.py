"""Ridge regression from sums: the fit and its strength, chosen on rows that were not fitted on."""

from __future__ import annotations

import torch
from torch import Tensor

STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""Ridge strengths tried, in shares of the mean squared feature."""

HELD_BACK = 4
"""Every fourth calibration batch chooses the strength and is not fitted on."""


def is_held_back(number: int) -> bool:
    """Whether batch `number` chooses the strength: every fourth one, and the second of few."""
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

    def error(self, change: Tensor | None) -> float:
        """Squared share of the target that is off with `change`, `[features, outs]`."""
        if change is None:
            return self.square / max(self.size, 1e-30)
        fitted = float((change * (self.gram @ change - 2 * self.cross)).sum())
        return (self.square + fitted) / max(self.size, 1e-30)


def best_change(fit: Sums, held: Sums, *, has_bias: bool) -> tuple[Tensor, float]:
    """Returns the change that is best on the rows held back, and its strength.

    Args:
        has_bias: whether the last feature is a column of ones; it is as good as free.
    """
    mean = float(fit.gram.diagonal().mean())
    ridge = torch.ones(len(fit.gram), dtype=torch.float64)
    if has_bias:
        ridge[-1] = 1e-6
    found = []
    for strength in STRENGTHS:
        matrix = fit.gram + torch.diag(ridge * max(strength * mean, 1e-12))
        change = torch.linalg.solve(matrix, fit.cross)
        found.append((held.error(change), strength, change))
    _, strength, change = min(found, key=lambda item: item[0])
    return change, strength
