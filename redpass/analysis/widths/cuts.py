"""Which units of a width go, in which order, and what takes over what they did.

The order is greedy: of what is left, the units go whose loss costs the readers least *after* the
best linear repair of their matrices, a few at a time. With `H` the inverse of the Gram matrix of
what is left (ridge added) and `W` a reader's matrix as repaired so far, losing feature `f` costs
`|W_f|^2 / H_ff`; without repair it would be `E|a_f|^2 |W_f|^2`. Removing the set `R` then sets

    W <- W - W_R (H_RR)^-1 H_R:        H <- H - H_:R (H_RR)^-1 H_R:

For a given choice the repair is a ridge regression of what goes on what stays: `a_gone ~ S a_kept`,
so `W_kept + W_gone S`. Its strength is the one that is best on batches that were not fitted on.

Source: optimal brain surgeon (Hassibi and Stork 1993) for groups, as in OBC (Frantar and Alistarh
2022, arXiv:2208.11580) and ZipLM (Kurtic et al. 2023, arXiv:2302.04089); FLAP (An et al. 2024,
arXiv:2312.11983) for taking up the mean in the bias.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from redpass.analysis.widths.narrowing import Repair, Width
from redpass.analysis.widths.statistics import Sums, View

STRENGTHS = (1e-8, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Ridge strengths tried, in shares of the mean squared feature."""

USUAL = 1e-2
"""The strength where nothing can be held back to choose it."""

ORDERING = 1e-3
"""The strength while the order is made."""

ROUNDS = 48
"""In how many steps all units would go: units of one step are judged alone."""


@dataclass(frozen=True)
class Rung:
    """One width that may be left.

    Attributes:
        keep: the units that stay, rising.
        repairs: weight of a reader -> what takes over the lost part; empty without repair.
        error: squared error put into what the readers write to, as a share of its squared norm,
            summed over readers; on batches held back where there are some.
        unrepaired: the same without repair.
        strength: the ridge strength, 0 without repair.
    """

    keep: Tensor
    repairs: dict[str, Repair]
    error: float
    unrepaired: float
    strength: float

    @property
    def count(self) -> int:
        """How many units stay."""
        return len(self.keep)


def energy_scores(width: Width, found: Sequence[View]) -> Tensor:
    """Returns `E|a_u|^2 |W_u|^2` of each unit, summed over readers: the loss without repair."""
    total = torch.zeros(width.size, dtype=torch.float64)
    for view in found:
        moments = view.whole.gram.diagonal()[:-1] / view.whole.tokens
        total += _by_unit(width, view, moments * view.rows.square().sum(0)) / view.energy
    return total


def removal_order(width: Width, found: Sequence[View], least: int, *, refit: bool) -> Tensor:
    """Returns the units in the order in which they go, until `least` are left.

    Args:
        refit: whether readers are repaired; else units go by `energy_scores`.
    """
    if not refit:
        return energy_scores(width, found).argsort(stable=True)[: width.size - least]
    states = [_State(width, view) for view in found]
    left = torch.arange(width.size)
    gone: list[Tensor] = []
    step = -(-width.size // ROUNDS)
    while len(left) > least:
        scores = torch.zeros(width.size, dtype=torch.float64)
        for state in states:
            scores += state.scores()
        count = min(step, len(left) - least)
        lost = left[scores[left].argsort(stable=True)[:count]]
        gone.append(lost)
        left = left[~torch.isin(left, lost)]
        for state in states:
            state.remove(lost)
    return torch.cat(gone) if gone else torch.zeros(0, dtype=torch.int64)


class _State:
    """One reader while units go: the inverse Gram matrix of what is left, and its matrix."""

    def __init__(self, width: Width, view: View) -> None:
        self.width, self.view = width, view
        gram = _usable(view, view.whole)
        gram = gram + ORDERING * _mean_square(gram, view) * torch.eye(len(gram))
        self.inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram))
        self.rows = torch.nn.functional.pad(view.rows, (0, len(gram) - view.rows.shape[1]))
        self.places = torch.arange(len(gram))

    def scores(self) -> Tensor:
        """What losing each unit costs; only those left mean something."""
        cost = self.rows.square().sum(0) / self.inverse.diagonal().clamp_min(1e-300)
        whole = torch.zeros(len(_usable_places(self.view)), dtype=torch.float64)
        whole[self.places] = cost
        features = whole[: self.view.rows.shape[1]]
        return _by_unit(self.width, self.view, features) / self.view.energy

    def remove(self, units: Tensor) -> None:
        """Takes units out and repairs the rest."""
        lost = torch.isin(self.places, self.view.reader.features(units))
        block = self.inverse[lost][:, lost]
        across = self.inverse[lost][:, ~lost]
        solved = torch.linalg.solve(block, across)
        self.rows = self.rows[:, ~lost] - self.rows[:, lost] @ solved
        self.inverse = self.inverse[~lost][:, ~lost] - across.T @ solved
        self.places = self.places[~lost]


def ridge_strengths(
    width: Width, found: Sequence[View], order: Tensor, least: int
) -> dict[str, float]:
    """Returns weight of a reader -> the ridge strength that repairs it best where it matters most.

    Args:
        least: how many units the narrowest rung leaves.
    """
    gone, keep = _parts(width, order, least)
    return {view.reader.weight: _strength(view, gone, keep) for view in found}


def rungs(
    width: Width,
    found: Sequence[View],
    order: Tensor,
    counts: Sequence[int],
    strengths: Mapping[str, float],
) -> list[Rung]:
    """Returns one rung for each number of units to leave, by the order in which units go.

    Args:
        strengths: weight of a reader -> ridge strength of its repair; empty where none is repaired.
    """
    return [_rung(found, *_parts(width, order, count), strengths) for count in counts]


def _parts(width: Width, order: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The units that go and those that stay, rising."""
    gone = order[: width.size - count].sort()[0]
    every = torch.arange(width.size)
    return gone, every[~torch.isin(every, gone)]


def _rung(
    found: Sequence[View], gone: Tensor, keep: Tensor, strengths: Mapping[str, float]
) -> Rung:
    bare = sum(_error(view, gone, keep, None) for view in found)
    if not strengths:
        return Rung(keep, {}, bare, bare, 0.0)
    error, repairs = 0.0, dict[str, Repair]()
    for view in found:
        strength = strengths[view.reader.weight]
        trial = _spread(view, view.fitted, gone, keep, strength)
        error += _error(view, gone, keep, trial)
        final = trial if view.held is None else _spread(view, view.whole, gone, keep, strength)
        repairs[view.reader.weight] = _repair(view, final, keep)
    return Rung(keep, repairs, error, bare, max(strengths.values()))


def _strength(view: View, gone: Tensor, keep: Tensor) -> float:
    """The strength that is best on the batches held back."""
    if view.held is None:
        return USUAL

    def off(strength: float) -> float:
        return _error(view, gone, keep, _spread(view, view.fitted, gone, keep, strength))

    return min(STRENGTHS, key=off)


def _usable_places(view: View) -> Tensor:
    """The features, and the constant behind them where the reader can take one up."""
    return torch.arange(view.rows.shape[1] + bool(view.reader.bias))


def _usable(view: View, sums: Sums) -> Tensor:
    count = len(_usable_places(view))
    return sums.gram[:count, :count] / max(sums.tokens, 1)


def _mean_square(gram: Tensor, view: View) -> float:
    return max(float(gram.diagonal()[: view.rows.shape[1]].mean()), 1e-30)


def _by_unit(width: Width, view: View, features: Tensor) -> Tensor:
    """Sums figures of features over the features of each unit."""
    total = torch.zeros(width.size, dtype=torch.float64)
    for offset, block in view.reader.parts:
        part = features[offset : offset + width.size * block]
        total += part.reshape(width.size, block).sum(1)
    return total


def _stay(view: View, keep: Tensor) -> Tensor:
    """Places of the features that stay, and of the constant."""
    constant = _usable_places(view)[view.rows.shape[1] :]
    return torch.cat([view.reader.features(keep), constant])


def _spread(view: View, sums: Sums, gone: Tensor, keep: Tensor, strength: float) -> Tensor:
    """Ridge regression of the features that go on what stays: `[gone, stay]`."""
    gram = _usable(view, sums)
    lost, stay = view.reader.features(gone), _stay(view, keep)
    ridge = torch.full((len(stay),), strength * _mean_square(gram, view), dtype=torch.float64)
    if view.reader.bias:
        ridge[-1] *= 1e-6  # the constant is as good as free
    matrix = gram[stay][:, stay] + torch.diag(ridge.clamp_min(1e-30))
    solved: Tensor = torch.linalg.solve(matrix, gram[stay][:, lost])
    return solved.T


def _error(view: View, gone: Tensor, keep: Tensor, spread: Tensor | None) -> float:
    """Mean squared error of the reader's output over its energy, on what judges."""
    gram = _usable(view, view.held or view.fitted)
    lost, stay = view.reader.features(gone), _stay(view, keep)
    rows = view.rows[:, lost]
    if spread is None:
        return float((rows @ gram[lost][:, lost] * rows).sum()) / view.energy
    off = torch.zeros(len(rows), len(gram), dtype=torch.float64)
    off[:, lost], off[:, stay] = rows, -(rows @ spread)
    return max(float((off @ gram * off).sum()), 0.0) / view.energy


def _repair(view: View, spread: Tensor, keep: Tensor) -> Repair:
    count = len(view.reader.features(keep))
    return Repair(spread[:, :count], spread[:, count] if view.reader.bias else None)
