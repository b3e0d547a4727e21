"""`stream_maps`: an affine map of the stream in place of the layers that were dropped.

Where layers are missing, the next kept branch reads the stream `x` of the rewritten model, and the
loaded model's stream there was `t`. With a column of ones in `x`,

    argmin over D of || x D - (t - x) ||^2 + strength * || D ||^2,      M = I + D

is the ridge regression towards the identity. The map does not fold into the projection before it,
as the skip connection goes past that projection; so `D` is cut to a low rank (the best one for
these rows: its fitted values on their first principal directions, reduced-rank regression, Izenman
1975) and kept as two thin linears beside the stream.

Source: a linear map in place of layers: ReplaceMe (Shopkhoev et al. 2025, arXiv:2505.02819), there
of full rank and folded into a feed-forward.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from redpass import rewrite
from redpass.analysis.compared import Compared
from redpass.analysis.linears import new_name
from redpass.analysis.refits import match_branches
from redpass.analysis.ridge import Sums, best_fit, fitted, is_held_back
from redpass.analysis.structure import structure
from redpass.analysis.tokens import Tokens
from redpass.errors import UsageError
from redpass.facts import Facts
from redpass.plan import Action, Edit, Insert, Ref, Replace, SetWeight, WeightRef
from redpass.program import Program

aten = torch.ops.aten

SHARES = (1 / 64, 1 / 32, 1 / 16, 1 / 8)
"""Ranks looked at, in shares of the stream's width. One of an eighth has 2% of the weights of a
usual layer."""

ENOUGH = 0.9
"""The least rank is taken that brings this share of what the largest one brings."""


@dataclass(frozen=True)
class StreamMap:
    """One map.

    Attributes:
        label: the branch it stands in front of.
        rank: of the map without the identity.
        edits: what puts it there.
        strength: the ridge strength chosen.
        before: share of the stream that was off on the batches held back, squared.
        after: the same with the map.
    """

    label: str
    rank: int
    edits: tuple[Edit, ...]
    strength: float
    before: float
    after: float


@dataclass(frozen=True)
class _Gap:
    value: str
    target: str
    label: str


def stream_maps(program: Program, facts: Facts, rank: int = 0) -> tuple[StreamMap, ...]:
    """Fits a map at every gap that gains from one, in order, each with those before it in place.

    Args:
        rank: of every map; 0 for the least that brings nearly all.

    Raises:
        DataError: no calibration data, a single batch, or values that are NaN or infinite.
        UsageError: a rank above the stream's width.
    """
    if program.lineage is None:
        return ()
    original = program.lineage.source
    found = list(_gaps(program, original, facts))
    if not found:
        return ()
    compared = Compared(program, original, facts.data())
    fitted = (_fit(compared, gap, rank) for gap in found)
    return tuple(each for each in fitted if each is not None)


def _gaps(program: Program, original: Program, facts: Facts) -> Iterator[_Gap]:
    """The places where branches of the loaded model are missing, before a branch that is kept."""
    rows, loaded, old = Tokens(program), Tokens(original), structure(original).branches
    matched = match_branches(facts.get(structure).branches, old)
    kept = {place for _, place in matched}
    for branch, place in matched:
        if not place or place - 1 in kept or old[place - 1].after != old[place].entry:
            continue
        value, target = program.nodes[branch.entry].meta["val"], old[place - 1].after
        width = rows.width(branch.entry)
        if value.dim() >= 2 and width == value.shape[-1] and width == loaded.width(target):
            yield _Gap(branch.entry, target, branch.label)


def _fit(compared: Compared, gap: _Gap, rank: int) -> StreamMap | None:
    width = int(compared.program.nodes[gap.value].meta["val"].shape[-1])
    if rank > width:
        hint = f"the stream has {width} features: give 1 to {width}, or 0 to choose"
        raise UsageError(f"a rank of {rank}", place="map_stream", hint=hint)
    sums = [Sums(width + 1, width) for _ in range(2)]
    for number, (stream,), target in compared.batches((gap.value,), gap.target, gap.label):
        features = torch.nn.functional.pad(stream, (0, 1), value=1.0)
        sums[is_held_back(number)].add(features, target - stream, float(target.square().sum()))
    found = best_fit(sums, has_bias=True)
    tried = fitted(sums[0], found.strength, has_bias=True)
    up = _directions(tried, sums[0])
    ranks = [rank] if rank else sorted({max(1, round(width * share)) for share in SHARES})
    cuts = {r: tried @ up[:, :r] @ up[:, :r].T for r in ranks}
    before = sums[1].error(None)
    errors = {r: sums[1].error(change) for r, change in cuts.items()}
    most = before - min(errors.values())
    if most <= 0:
        return None
    best = next(r for r in ranks if before - errors[r] >= ENOUGH * most)
    up = _directions(found.change, sums[0] + sums[1])[:, :best]
    edits = _edits(compared.program, gap, found.change @ up, up)
    action = Action("map", "here", edits, "")
    compared.move(rewrite.apply(compared.program, [action]))
    return StreamMap(gap.label, best, edits, found.strength, before, errors[best])


def _directions(change: Tensor, fit: Sums) -> Tensor:
    """Principal directions of the fitted values, `[width, width]`, the largest first."""
    vectors: Tensor = torch.linalg.eigh(change.T @ fit.gram @ change)[1]
    return vectors.flip(1)


def _edits(program: Program, gap: _Gap, down: Tensor, up: Tensor) -> tuple[Edit, ...]:
    """The stream and beside it two thin linears; the offset is cut to the same directions.

    Args:
        down: `[width + 1, rank]`, the last row is the offset; `up`: `[width, rank]`.
    """
    node, stem = program.nodes[gap.value], gap.value
    dtype = node.meta["val"].dtype
    names = [new_name(program, f"{stem}_map", part) for part in ("down", "bias", "up")]
    source = f"ridge regression in front of {gap.label}"
    values = (down[:-1].T, down[-1], up)
    before = next(other.name for other in program.graph.nodes if other in node.users)
    return (
        *(
            SetWeight(name, value.to(dtype).contiguous(), source)
            for name, value in zip(names, values, strict=True)
        ),
        Insert(
            f"{stem}_down",
            aten.linear.default,
            (Ref(stem), WeightRef(names[0]), WeightRef(names[1])),
            before,
        ),
        Insert(
            f"{stem}_up", aten.linear.default, (Ref(f"{stem}_down"), WeightRef(names[2])), before
        ),
        Insert(f"{stem}_mapped", aten.add.Tensor, (Ref(stem), Ref(f"{stem}_up")), before),
        Replace(stem, f"{stem}_mapped"),
    )
