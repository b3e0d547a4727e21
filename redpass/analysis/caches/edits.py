"""The edits that let a cache hold fewer numbers a position, for keys and for values.

`down` `[groups, width, rank]` makes what is kept of the numbers of a group of heads, `up` takes it
back. Where nothing but moves stands between, they are multiplied into the weights on both sides.
"""

from __future__ import annotations

import torch
from torch import fx

from redpass import ops
from redpass.analysis.caches.parts import (
    Factors,
    as_typed,
    is_fused,
    join_kept,
    keep_scale,
    make_latent,
    of_heads,
    spread_kept,
    start_draft,
    turn_queries,
)
from redpass.analysis.caches.positions import AllPositions
from redpass.analysis.caches.sites import CacheSide
from redpass.analysis.drafts import Draft
from redpass.analysis.heads.axes import Unfit
from redpass.plan import Edit, Ref, Replace, SetArgument

aten = torch.ops.aten


def projected_keys(cache: CacheSide, factors: Factors, size: int) -> tuple[Edit, ...]:
    """Keeps `down k` of the keys as the attention reads them; `up` goes to the queries.

    Rotation and norms have been done before, so nothing is rebuilt.

    Args:
        size: heads of a group.
    """
    draft, core = start_draft(cache, "keys"), cache.site.core.node
    check_query(cache)
    folds = cache.is_moved_only
    latent = make_latent(draft, cache, factors, cache.new, folded=folds)
    join, kept = join_kept(draft, cache, factors, latent)
    ups = factors.by_head(size)[torch.tensor(cache.site.sides["key"].of_head)]
    draft.before = core
    keys = spread_kept(draft, cache, join, size)
    queries = turn_queries(draft, cache, keep_scale(core, ups))
    draft.edits += [
        SetArgument(core.name, cache.site.core.query.name, queries.name),
        SetArgument(core.name, cache.operand.name, keys.name),
    ]
    return (*kept, *draft.edits, Replace(cache.join.name, join.name))


def rebuilt(cache: CacheSide, factors: Factors, size: int) -> tuple[Edit, ...]:
    """Keeps `down v` of what the projection gives; all of it is rebuilt for the attention.

    Norms and rotation are done on what is rebuilt, at the positions it belongs to.
    """
    draft = start_draft(cache, "rebuilt")
    latent = make_latent(draft, cache, factors, cache.split, folded=cache.is_split_plain)
    join, kept = join_kept(draft, cache, factors, latent)
    full = restored(draft, cache, factors, join, size, cache.split)
    if cache.way:
        full = again(draft, cache, join, full)
    readers = [user for user in cache.join.users if user.op != "output" and not ops.is_size(user)]
    draft.edits += [SetArgument(user.name, cache.join.name, full.name) for user in readers]
    return (*kept, *draft.edits, Replace(cache.join.name, join.name))


def absorbed_values(cache: CacheSide, factors: Factors, size: int) -> tuple[Edit, ...]:
    """Keeps `down v` of the values; `up` goes behind the attention, into the output projection.

    Into its weights, where that takes no more of them than `up` itself does.
    """
    draft, core = start_draft(cache, "values"), cache.site.core.node
    latent = make_latent(draft, cache, factors, cache.new, folded=cache.is_moved_only)
    join, kept = join_kept(draft, cache, factors, latent)
    draft.before = core
    values = spread_kept(draft, cache, join, size)
    draft.edits.append(SetArgument(core.name, cache.operand.name, values.name))
    behind = into_output if output_folds(cache, factors) else put_behind
    draft.edits += behind(cache, factors, size)
    return (*kept, *draft.edits, Replace(cache.join.name, join.name))


def check_query(cache: CacheSide) -> None:
    """Raises `Unfit` where queries cannot be turned before one attention op."""
    shape = cache.site.core.query.meta["val"].shape
    if not is_fused(cache) or len(shape) != 4 or shape[1] != cache.site.heads:
        raise Unfit("its attention is no fused op on queries split by heads")


def restored(
    draft: Draft, cache: CacheSide, factors: Factors, join: Ref, size: int, like: fx.Node
) -> Ref:
    """All positions of what was made latent, with the axes of `like`: `split` or `new`."""
    name = cache.side.linear.weight
    weight = draft.weight(name, f"{cache.side.kind}_up", as_typed(factors.up.mT, like))
    full = draft.call(aten.matmul.default, join, weight)
    if factors.mean is not None and bool(factors.mean.any()):
        each = as_typed(factors.mean.unsqueeze(1), like)
        mean = draft.weight(name, f"{cache.side.kind}_mean", each)
        full = draft.call(aten.add.Tensor, full, mean)
    at_front = isinstance(like.meta["val"].shape[1], int)
    if not at_front:
        flat = draft.call(aten.flatten.using_ints, draft.call(aten.transpose.int, full, 1, 2), 2)
        return draft.call(aten.unflatten.int, flat, 2, [cache.heads, -1])
    if size == 1:
        return full
    parts = draft.call(aten.unflatten.int, full, 3, [size, -1])
    turned = draft.call(aten.transpose.int, parts, 2, 3)
    return draft.call(aten.flatten.using_ints, turned, 1, 2)


def again(draft: Draft, cache: CacheSide, join: Ref, full: Ref) -> Ref:
    """What stands between `split` and `new`, on all positions."""
    total = draft.call(aten.sym_size.int, join, 2)
    length = draft.call(aten.sym_size.int, Ref(cache.past.name), 2)
    positions = AllPositions(draft, cache, total, length)
    positions.known[cache.split] = full
    found: Ref = positions.of(cache.new)
    wanted = [str(size) for size in cache.join.meta["val"].shape]
    if [str(size) for size in draft.shape(found)] != wanted:
        raise Unfit("rebuilt on all positions it does not have the sizes of what was kept")
    return found


def output_folds(cache: CacheSide, factors: Factors) -> bool:
    """Whether the way back goes into the output projection's weights, at no cost."""
    site = cache.site
    way = site.flow.between(site.core.output, site.program.nodes[site.output.input])
    if not all(ops.is_view(n) or ops.is_call(n, *ops.COPIES, *ops.DROPOUTS) for n in way):
        return False
    outs, width, rank = site.output.outs, cache.width, factors.rank
    return rank * outs <= width * (outs + rank)


def into_output(cache: CacheSide, factors: Factors, size: int) -> list[Edit]:
    """A new output projection that reads what the attention makes of what is kept."""
    site, linear = cache.site, cache.site.output
    node = site.program.nodes[linear.node]
    draft = Draft(site.program, f"{cache.join.name}_output", node)
    ups, weight = of_heads(cache, factors.by_head(size)), site.output_weight().double()
    folded = torch.einsum("ohd,hdr->ohr", weight, ups).flatten(1)
    matrix = draft.weight(linear.weight, "latent", as_typed(folded, node))
    offset = linear.offset(site.program)
    mean = factors.mean_by_head(size)
    if mean is not None:
        added = torch.einsum("ohd,hd->o", weight, of_heads(cache, mean))
        offset = added if offset is None else offset.double() + added
    bias = None
    if offset is not None:
        bias = draft.weight(linear.weight, "latent_bias", as_typed(offset, node))
    flat = draft.call(aten.transpose.int, _heads_out(draft, cache, factors), 1, 2)
    flat = draft.call(aten.flatten.using_ints, flat, 2)
    if node.meta["val"].dim() == 2:
        flat = draft.call(aten.flatten.using_ints, flat, 0, 1)
    made = draft.call(aten.linear.default, flat, matrix, bias)
    return [*draft.edits, Replace(node.name, made.name)]


def put_behind(cache: CacheSide, factors: Factors, size: int) -> list[Edit]:
    """Heads of their old width again, for whatever reads them."""
    site, output = cache.site, cache.site.core.output
    after = min(output.users, key=site.flow.order.__getitem__)
    draft = Draft(site.program, f"{cache.join.name}_behind", after)
    name = cache.side.linear.weight
    ups = of_heads(cache, factors.by_head(size)).mT
    up = draft.weight(name, f"{cache.side.kind}_up", as_typed(ups, output))
    full = draft.call(aten.matmul.default, _heads_out(draft, cache, factors), up)
    mean = factors.mean_by_head(size)
    if mean is not None:
        shift = as_typed(of_heads(cache, mean).unsqueeze(1), output)
        weight = draft.weight(name, f"{cache.side.kind}_mean", shift)
        full = draft.call(aten.add.Tensor, full, weight)
    return [*draft.edits, Replace(output.name, full.name)]


def _heads_out(draft: Draft, cache: CacheSide, factors: Factors) -> Ref:
    """The attention's result, which other edits make as wide as what is kept."""
    return draft.stand_in(cache.site.core.output, {3: factors.rank})
