"""`stream_statistics`: all that one calibration run tells about the residual stream.

Block influence, angular distance, CKA, branch similarity and branch entropy are read off this one
result, so any number of them costs one run. What is kept is small (a few numbers a branch, two
matrices a stream); the sums of the run itself are dropped.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from redpass.analysis.observers import (
    STRETCH,
    Alignment,
    KernelAlignment,
    Observer,
    Spread,
    Turn,
    all_pairs,
)
from redpass.analysis.statistics import Statistics, collect, footprint
from redpass.analysis.structure import Branch, Structure, structure
from redpass.analysis.tokens import Tokens
from redpass.facts import Facts
from redpass.program import Program

EXACT_BYTES = 64 << 20
"""Up to this size of all cross-Gram matrices CKA is exact, above it is estimated on stretches."""

LEAST_VARIANCE = 1e-12
"""Variance that a constant feature counts with in entropies."""

Square = tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class Stage:
    """Values of one residual stream that have one width and the same tokens, and how they relate.

    Attributes:
        names: their nodes, in order: before the first branch, then after each one.
        cosines: `[i][j]`, mean cosine over tokens.
        angles: `[i][j]`, mean of `arccos(cosine) / π`.
        borders: the names before and after whole layers.
        alignments: `[i][j]` over the borders, HSIC with linear kernels (see `cka`).
        estimator: `exact` or `stretches`.
        tokens: how many tokens were seen.
    """

    names: tuple[str, ...]
    cosines: Square
    angles: Square
    borders: tuple[str, ...]
    alignments: Square
    estimator: str
    tokens: int


@dataclass(frozen=True)
class BranchFigures:
    """What one branch does, over calibration tokens.

    Attributes:
        cosine: mean cosine between the stream with and without the branch's contribution.
        relative_norm: mean of `|b| / |x'|`, the size of the contribution.
        entropy: mean over features of `ln(2πe σ²) / 2` of the contribution; NaN from one token.
        tokens: how many tokens were counted.
    """

    cosine: float
    relative_norm: float
    entropy: float
    tokens: int


@dataclass(frozen=True)
class StreamStatistics:
    """What the calibration run told; empty for a program without a residual stream."""

    stages: tuple[Stage, ...] = ()
    branches: Mapping[str, BranchFigures] = ()  # type: ignore[assignment]

    def between(self, before: str, after: str) -> tuple[float, float] | None:
        """Returns mean cosine and mean angle / π between two values, None across streams."""
        for stage in self.stages:
            if before in stage.names and after in stage.names:
                i, j = stage.names.index(before), stage.names.index(after)
                return stage.cosines[i][j], stage.angles[i][j]
        return None


def stream_statistics(program: Program, facts: Facts) -> StreamStatistics:
    """Runs the calibration data once.

    Raises:
        DataError: no calibration data, or values that are NaN or infinite (the branch is named).
        UsageError: the sums would not fit in memory.
    """
    found = facts.get(structure)
    if not found.branches:
        return StreamStatistics((), {})
    return _read(facts.recall("stream statistics", lambda: asdict(_measure(program, found, facts))))


def total(branch: Branch) -> str:
    """The stream value that holds the branch's contribution, before any norm after the add."""
    return branch.join if branch.form == "post-norm" else branch.after


def memory(program: Program, facts: Facts) -> int:
    """Returns how many bytes the sums of the calibration run take, without running anything.

    Beside them the run holds the stream's values of one batch.
    """
    found = facts.get(structure)
    return footprint(program, _observers(_plans(program, found), found))


def _measure(program: Program, found: Structure, facts: Facts) -> StreamStatistics:
    plans = _plans(program, found)
    sums = collect(program, _observers(plans, found), facts.data(), labels=_labels(found))
    return StreamStatistics(
        tuple(plan.stage(sums) for plan in plans),
        {branch.label: _figures(sums, branch) for branch in found.branches},
    )


def _plans(program: Program, found: Structure) -> list[_Plan]:
    return [_Plan(program, names, found) for names in _groups(program, found)]


def _observers(plans: list[_Plan], found: Structure) -> list[Observer]:
    observers: list[Observer] = [observer for plan in plans for observer in plan.observers]
    for branch in found.branches:
        observers += [Turn(total(branch), branch.exit), Spread(branch.exit)]
    return observers


def _groups(program: Program, found: Structure) -> Iterator[tuple[str, ...]]:
    """The values of each stream, parted where the stream changes its width."""
    tokens = Tokens(program)
    streams = {label: layer.stream for layer in found.layers for label in layer.branches}
    for stream in dict.fromkeys(streams.values()):
        branches = [b for b in found.branches if streams[b.label] == stream]
        names = dict.fromkeys(name for b in branches for name in (b.entry, b.after))
        shapes: dict[Any, list[str]] = {}
        for name in names:
            shapes.setdefault(tokens.form(name), []).append(name)
        yield from map(tuple, shapes.values())


class _Plan:
    """What is observed of one group of values."""

    def __init__(self, program: Program, names: tuple[str, ...], found: Structure) -> None:
        self.names = names
        ends = {b.label: b for b in found.branches}
        layers = [(ends[layer.branches[0]], ends[layer.branches[-1]]) for layer in found.layers]
        borders = {name for first, last in layers for name in (first.entry, last.after)}
        self.borders = tuple(name for name in names if name in borders)
        self.pairs = all_pairs(self.borders)
        self.is_exact = footprint(program, self.pairs) <= EXACT_BYTES
        kernels = self.pairs if self.is_exact else (KernelAlignment(self.borders),)
        self.observers: tuple[Observer, ...] = (Alignment(names), *kernels)

    def stage(self, sums: Statistics) -> Stage:
        """The group's figures."""
        cosines, angles = sums.mean(Alignment(self.names))
        return Stage(
            self.names,
            _square(cosines),
            _square(angles),
            self.borders,
            _square(self._alignments(sums)),
            "exact" if self.is_exact else f"stretches of {STRETCH} tokens",
            sums.tokens[Alignment(self.names)],
        )

    def _alignments(self, sums: Statistics) -> Tensor:
        if not self.is_exact:
            return sums.mean(KernelAlignment(self.borders))
        count = len(self.borders)
        found = torch.zeros(count, count, dtype=torch.float64)
        for (i, j), pair in zip(_upper(count), self.pairs, strict=True):
            moments = sums.moments(pair.left, pair.right)
            found[i, j] = found[j, i] = moments.centred.square().sum() / moments.tokens**2
        return found


def _upper(count: int) -> Iterator[tuple[int, int]]:
    return itertools.combinations_with_replacement(range(count), 2)


def _figures(sums: Statistics, branch: Branch) -> BranchFigures:
    turn = Turn(total(branch), branch.exit)
    cosine, ratio = sums.mean(turn).tolist()
    return BranchFigures(cosine, ratio, _entropy(sums, branch.exit), sums.tokens[turn])


def _entropy(sums: Statistics, name: str) -> float:
    if sums.tokens[Spread(name)] < 2:
        return math.nan
    mean, square = sums.mean(Spread(name))
    variance = (square - mean.square()).clamp_min(LEAST_VARIANCE)
    return float((2 * math.pi * math.e * variance).log().mean() / 2)


def _labels(found: Structure) -> dict[str, str]:
    """What to call the nodes in errors: the branch that ends there; the first one where several."""
    labels: dict[str, str] = {}
    for branch in found.branches:
        for name in (branch.exit, total(branch), branch.after):
            labels.setdefault(name, branch.label)
    labels.setdefault(found.branches[0].entry, f"input of {found.branches[0].label}")
    return labels


def _square(values: Tensor) -> Square:
    return tuple(map(tuple, values.tolist()))


def _read(data: Mapping[str, Any]) -> StreamStatistics:
    """Rebuilds the result from what a journal kept."""
    stages = [{key: _frozen(value) for key, value in stage.items()} for stage in data["stages"]]
    branches = {label: BranchFigures(**figures) for label, figures in data["branches"].items()}
    return StreamStatistics(tuple(Stage(**stage) for stage in stages), branches)


def _frozen(value: Any) -> Any:
    return tuple(map(_frozen, value)) if isinstance(value, list | tuple) else value
