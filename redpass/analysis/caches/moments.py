"""What calibration data say about kept keys and values: second moments of every group of heads."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx

from redpass.analysis.caches.sites import CacheSide, CacheSites
from redpass.analysis.observers import BlockGram, Observer, Spread
from redpass.analysis.statistics import Statistics, collect
from redpass.facts import Facts
from redpass.program import Program


@dataclass(frozen=True, eq=False)
class Moments:
    """Of one cache; per token, float64.

    Attributes:
        gram: `E[v vᵀ]` of what is kept, `[groups, width, width]`.
        mean: `E[v]`, `[groups, width]`.
        split_gram: the same of what the projection gives, before norms and rotation.
        queries: `E[q qᵀ]` of each query head, `[heads, width, width]`; None for values, and where
            the queries have no axis for heads.
        share: squared size of what the attention adds to the stream, over that of the stream.
    """

    gram: Tensor
    mean: Tensor
    split_gram: Tensor
    queries: Tensor | None
    share: float

    @property
    def covariance(self) -> Tensor:
        """`gram` without the mean's part."""
        return self.gram - self.mean.unsqueeze(2) * self.mean.unsqueeze(1)


def cache_moments(
    program: Program, facts: Facts, sites: CacheSites, size: int
) -> dict[tuple[str, str], Moments]:
    """Measures all caches in one run over the calibration data.

    Args:
        size: heads of a group; every cache has a multiple of it.
    """
    sides = {key: side for key, side in sites.found.items() if isinstance(side, CacheSide)}
    wanted = {key: _observers(side, size) for key, side in sides.items()}
    every = tuple(dict.fromkeys(o for items in wanted.values() for o in items))
    if not every:
        return {}
    labels = {o.values[0]: f"{key[0]}/{key[1]}" for key, items in wanted.items() for o in items}

    def measure() -> dict[str, object]:
        return collect(program, every, facts.data(), labels=labels).to_json()

    found = Statistics.from_json(every, facts.recall(f"cache moments of {size} heads", measure))
    return {key: _moments(side, size, found) for key, side in sides.items()}


def _observers(side: CacheSide, size: int) -> tuple[Observer, ...]:
    groups, branch = side.heads // size, side.site.branch
    found: list[Observer] = [
        BlockGram(side.new.name, groups),
        BlockGram(side.split.name, groups),
        Spread(branch.exit),
        Spread(branch.after),
    ]
    if side.side.kind == "key" and has_heads(side.site.core.query):
        found.append(BlockGram(side.site.core.query.name, side.site.heads))
    return tuple(found)


def has_heads(query: fx.Node) -> bool:
    """Whether queries have an axis for heads, `[batch, heads, seq, width]`."""
    shape = query.meta["val"].shape
    fixed = [isinstance(size, int) for size in shape]
    return len(shape) == 4 and fixed[1] and not fixed[2] and fixed[3]


def _moments(side: CacheSide, size: int, found: Statistics) -> Moments:
    groups, branch = side.heads // size, side.site.branch
    whole = found.mean(BlockGram(side.new.name, groups))
    split = found.mean(BlockGram(side.split.name, groups))
    queries = BlockGram(side.site.core.query.name, side.site.heads)
    added, stream = (float(found.mean(Spread(n))[1].sum()) for n in (branch.exit, branch.after))
    return Moments(
        gram=whole[:, :-1, :-1],
        mean=whole[:, -1, :-1],
        split_gram=split[:, :-1, :-1],
        queries=found.mean(queries)[:, :-1, :-1] if queries in found.totals else None,
        share=added / max(stream, torch.finfo(torch.float64).tiny),
    )
