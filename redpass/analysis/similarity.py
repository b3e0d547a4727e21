"""Branch and layer similarity: how little a branch turns the residual stream.

Sources: Block Influence, `1 - E cos(x_i, x_{i+1})` (ShortGPT, Men et al. 2024); the same for one
attention or feed-forward branch alone (LLM-Drop, He et al. 2024).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from redpass.analysis.stream_statistics import BranchFigures, stream_statistics
from redpass.analysis.structure import Structure, structure
from redpass.facts import Facts
from redpass.program import Program


@dataclass(frozen=True)
class Similarity:
    """Branch label -> its figures; and mean cosines between the stream's values.

    Attributes:
        names: nodes of the stream's values: before the first branch, then after each one.
        labels: what to call them: `input`, `after layers.0.attention`...
        cosines: `[i][j]`, mean cosine over tokens between stream values i and j; NaN between
            values of different streams or widths.
    """

    branches: Mapping[str, BranchFigures]
    labels: tuple[str, ...]
    cosines: tuple[tuple[float, ...], ...]
    names: tuple[str, ...] = ()


def similarity(program: Program, facts: Facts) -> Similarity:
    """Reads branch similarity and stream cosines off the calibration run; empty without a stream.

    Raises:
        DataError: no calibration data, or a branch whose values are NaN or infinite (named).
    """
    del program
    found, measured = facts.get(structure), facts.get(stream_statistics)
    values = _stream_values(found)
    pairs = [[measured.between(a, b) for b in values] for a in values]
    cosines = tuple(tuple(pair[0] if pair else math.nan for pair in row) for row in pairs)
    return Similarity(measured.branches, tuple(values.values()), cosines, tuple(values))


def _stream_values(found: Structure) -> dict[str, str]:
    """The stream before the first branch, then after each one, without repetitions: labels."""
    if not found.branches:
        return {}
    last = {branch.after: f"after {branch.label}" for branch in found.branches}
    return {found.branches[0].entry: "input"} | last
