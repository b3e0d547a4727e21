"""Parts of the edits on caches: latents, spreading them over heads, queries in their space."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx

from redpass import ops
from redpass.analysis.caches.sites import CacheSide, is_move
from redpass.analysis.drafts import Draft
from redpass.analysis.heads.sites import Side
from redpass.plan import Ref, ResizeState

aten = torch.ops.aten
FUSED = "scaled_dot_product_attention"


@dataclass(frozen=True, eq=False)
class Factors:
    """What is kept of a group's numbers `v`, and how they come back: `v ~ up (down v) + mean`.

    Attributes:
        down: `[groups, rank, width]`, float64.
        up: `[groups, width, rank]`, float64.
        mean: `[groups, width]`, float64; None for none.
    """

    down: Tensor
    up: Tensor
    mean: Tensor | None = None

    @property
    def rank(self) -> int:
        """Numbers a position and group that are kept."""
        return int(self.down.shape[1])

    @property
    def groups(self) -> int:
        """Groups of heads."""
        return len(self.down)

    def by_head(self, size: int) -> Tensor:
        """`up` for each of the heads in the groups, `[groups * size, width / size, rank]`."""
        found: Tensor = self.up.unflatten(1, (size, -1)).flatten(0, 1)
        return found

    def mean_by_head(self, size: int) -> Tensor | None:
        """`mean` for each head, `[groups * size, width / size]`, None where it is zero."""
        if self.mean is None or not bool(self.mean.any()):
            return None
        found: Tensor = self.mean.unflatten(1, (size, -1)).flatten(0, 1)
        return found


def is_fused(cache: CacheSide) -> bool:
    """Whether the attention is one op whose operands may be as wide as they like."""
    return ops.is_call(cache.site.core.node, FUSED)


def start_draft(cache: CacheSide, what: str) -> Draft:
    """Returns an empty draft before the place where new positions are joined to kept ones."""
    return Draft(cache.site.program, f"{cache.join.name}_{what}", cache.join)


def join_kept(
    draft: Draft, cache: CacheSide, factors: Factors, latent: Ref
) -> tuple[Ref, tuple[ResizeState, ...]]:
    """Joins what is new to what is kept, and gives the cache their size."""
    past = draft.stand_in(cache.past, {1: factors.groups, 3: factors.rank})
    join = draft.call(aten.cat.default, [past, latent], 2)
    sizes = ((1, factors.groups), (3, factors.rank))
    return join, tuple(ResizeState(*cache.state, axis, size) for axis, size in sizes)


def make_latent(
    draft: Draft, cache: CacheSide, factors: Factors, node: fx.Node, *, folded: bool
) -> Ref:
    """What is kept of the new positions, `[batch, groups, seq, rank]`."""
    side = cache.side
    if folded and (source := rows_of(side, cache)) is not None:
        matrix = side.weight(cache.site.program).double().unflatten(0, (factors.groups, -1))
        weight = (factors.down @ matrix.flatten(1, 2)).flatten(0, 1)
        bias = side.bias(cache.site.program)
        shift = None
        if bias is not None:
            each = bias.double().reshape(factors.groups, -1, 1)
            shift = (factors.down @ each).flatten()
        return call_linear(draft, side, source, weight, shift, factors.groups)
    heads = Ref(node.name)
    if isinstance(node.meta["val"].shape[2], int):
        heads = draft.call(aten.transpose.int, heads, 1, 2)
    if factors.groups != cache.heads:
        parts = draft.call(aten.unflatten.int, heads, 1, [factors.groups, -1])
        heads = draft.call(aten.flatten.using_ints, draft.call(aten.transpose.int, parts, 2, 3), 3)
    down = draft.weight(side.linear.weight, f"{side.kind}_down", as_typed(factors.down.mT, node))
    return draft.call(aten.matmul.default, heads, down)


def call_linear(
    draft: Draft, side: Side, source: fx.Node, weight: Tensor, bias: Tensor | None, parts: int
) -> Ref:
    """`[batch, parts, seq, n]` of a linear `[parts * n, ins]` on what the side's linear reads."""
    name = side.linear.weight
    matrix = draft.weight(name, f"{side.kind}_latent", as_typed(weight, source))
    shift = None
    if bias is not None:
        shift = draft.weight(name, f"{side.kind}_latent_bias", as_typed(bias, source))
    made = draft.call(aten.linear.default, Ref(source.name), matrix, shift)
    split = draft.call(aten.unflatten.int, made, 2, [parts, -1])
    return draft.call(aten.transpose.int, split, 1, 2)


def rows_of(side: Side, cache: CacheSide) -> fx.Node | None:
    """What the linear reads, as `[batch, seq, ins]`; None where it is flattened in another way."""
    node: fx.Node = cache.site.program.nodes[side.linear.input]
    if node.meta["val"].dim() == 2 and ops.is_call(node, *ops.RESHAPES):
        source = node.args[0]
        assert isinstance(source, fx.Node)
        node = source
    value = node.meta["val"]
    fits = value.dim() == 3 and ops.expression(value.shape[1]) == cache.seq
    return node if fits and value.shape[2] == side.linear.ins else None


def turn_queries(draft: Draft, cache: CacheSide, ups: Tensor) -> Ref:
    """Queries times `ups` `[heads, width, rank]`, in their weights where only moves are between."""
    side, query = cache.site.sides["query"], cache.site.core.query
    source = rows_of(side, cache)
    made = cache.site.program.nodes[side.projection.output]
    is_plain = all(map(is_move, cache.site.flow.between(made, query)))
    whole = side.heads == len(ups) and side.of_head == tuple(range(len(ups)))
    if source is None or not is_plain or not whole:
        up = draft.weight(side.linear.weight, f"{side.kind}_up", as_typed(ups, query))
        return draft.call(aten.matmul.default, Ref(query.name), up)
    turned = ups.mT
    weight = (turned @ side.weight(cache.site.program).double()).flatten(0, 1)
    bias = side.bias(cache.site.program)
    shift = None if bias is None else (turned @ bias.double().unsqueeze(2)).flatten()
    return call_linear(draft, side, source, weight, shift, len(ups))


def keep_scale(core: fx.Node, ups: Tensor) -> Tensor:
    """Keeps the scale that the op takes from the width of its queries."""
    if ops.argument(core, "scale") is not None:
        return ups
    factor: float = (ups.shape[2] / ups.shape[1]) ** 0.5
    return ups * factor


def spread_kept(draft: Draft, cache: CacheSide, join: Ref, size: int) -> Ref:
    """One entry for each head that the attention is given, `[batch, heads, positions, rank]`."""
    readers = cache.group_of_reader(size)
    groups = int(draft.shape(join)[1])
    if readers == tuple(range(groups)):
        return join
    count = len(readers) // groups
    if readers == tuple(reader // count for reader in range(len(readers))):
        wide = draft.call(
            aten.expand.default,
            draft.call(aten.unsqueeze.default, join, 2),
            [-1, -1, count, -1, -1],
        )
        return draft.call(aten.flatten.using_ints, wide, 1, 2)
    side = cache.side
    places = draft.weight(side.linear.weight, f"{side.kind}_groups", torch.tensor(readers))
    return draft.call(aten.index_select.default, join, 1, places)


def of_heads(cache: CacheSide, each: Tensor) -> Tensor:
    """For each query head the entry of the value head it reads."""
    return each[torch.tensor(cache.side.of_head)]


def as_typed(value: Tensor, like: fx.Node) -> Tensor:
    """Returns numbers in the type of a node's value."""
    return value.to(like.meta["val"].dtype)
