"""The edits that keep a cache's latest tokens in full beside the latents of all of them.

A query reads the key or value of a token in full where the token is at most `window` places before
it (or behind it), and what its latent gives back where it is further away. That is a rule on pairs
of tokens, so it holds however the tokens are dealt out to calls.

    keys    [ from latents: 0 ... past + seq ) [ in full: past - recent ... past + seq )
    mask    [ mask, where further away         ) [ mask, where not                        )

Each pair is open in one of the two halves, so one attention op over both gives what the rule says.
A call with one token reads `window` positions more than before; a call with many reads all twice.

The state of the window holds `recent = min(window, past)` tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from redpass import ops
from redpass.analysis.caches.edits import (
    again,
    check_query,
    into_output,
    output_folds,
    put_behind,
    restored,
)
from redpass.analysis.caches.parts import (
    Factors,
    as_typed,
    join_kept,
    make_latent,
    spread_kept,
    start_draft,
    turn_queries,
)
from redpass.analysis.caches.sites import CacheSide, CacheSites, is_move
from redpass.analysis.caches.two_halves import Lengths, two_halves
from redpass.analysis.drafts import END, Draft
from redpass.analysis.heads.axes import Unfit
from redpass.data import Batches
from redpass.errors import DataError, UsageError
from redpass.plan import AddState, Edit, Ref, Replace, SetArgument
from redpass.program import Program

aten = torch.ops.aten


@dataclass(frozen=True)
class _Halves:
    """What a side gives the attention.

    Attributes:
        join: latents of all positions, `[batch, groups, past + seq, rank]`.
        far: what they give back, `[batch, heads, past + seq, width]`.
        new: new positions in full, `[batch, heads, seq, width]`.
        resized: the state that holds latents.
    """

    join: Ref
    far: Ref
    new: Ref
    resized: tuple[Edit, ...]


def windowed(
    cache: CacheSide, factors: Factors, size: int, window: int, *, rebuilt: bool
) -> tuple[Edit, ...]:
    """Keeps latents of all tokens and the latest `window` tokens in full.

    Args:
        size: heads of a group.
        window: at least 1.
        rebuilt: whether latents are of what the projection gives, before norms and rotation.

    Raises:
        Unfit: the attention is no single op, or its mask is not understood.
    """
    _check(cache)
    draft, site, core = start_draft(cache, "window"), cache.site, cache.site.core.node
    basis = None
    if not rebuilt and size == 1:
        latent, basis = turned(factors)
        halves = _in_basis(draft, cache, latent, basis)
    elif rebuilt:
        halves = _rebuilt(draft, cache, factors, size)
    else:
        halves = _restored(draft, cache, factors, size)
    lengths = Lengths.of(draft, cache, window)
    state, near = _recent(draft, cache, halves.new, lengths)
    sides = (spread_kept(draft, cache, halves.far, 1), spread_kept(draft, cache, near, 1))
    before = [*halves.resized, state, *draft.edits]
    once = two_halves(draft, cache, lengths, *sides)
    draft.edits = []
    behind: list[Edit] = []
    if basis is not None and cache.side.kind == "key":
        ups = basis.by_head(1)[torch.tensor(cache.side.of_head)]
        queries = turn_queries(draft, cache, ups)
        draft.edits.append(SetArgument(core.name, site.core.query.name, queries.name))
    elif basis is not None:
        write = into_output if output_folds(cache, basis) else put_behind
        behind = write(cache, basis, 1)
    return (*before, once, *draft.edits, *behind, Replace(cache.join.name, halves.join.name))


def _check(cache: CacheSide) -> None:
    check_query(cache)
    site, core = cache.site, cache.site.core.node
    if ops.argument(core, "is_causal") or ops.argument(core, "dropout_p"):
        raise Unfit("its attention makes its mask by itself, or drops weights")
    mask, total = ops.argument(core, "attn_mask"), cache.seq + cache.past_length
    if mask is not None and ops.expression(mask.meta["val"].shape[-1]) != total:
        raise Unfit("its mask has no number for each position")
    operands = [site.sides[kind].node for kind in ("key", "value")]
    if operands[0] is operands[1]:
        raise Unfit("its keys are its values")
    for node in operands:
        if node.meta["val"].dim() != 4 or ops.expression(node.meta["val"].shape[2]) != total:
            raise Unfit("its keys or values are not all positions of one cache")
    way = site.flow.between(cache.join, cache.operand)
    if cache.join is not cache.operand and not all(map(is_move, way)):
        raise Unfit("what is kept is not what the attention reads")


def check_window(place: str, window: int) -> None:
    """Raises `UsageError` when `window` is no count of tokens."""
    if isinstance(window, bool) or not isinstance(window, int) or window < 0:
        hint = "give how many of the latest tokens are kept in full, 0 for none"
        raise UsageError(f"window={window!r}", place=place, hint=hint)


def check_rows(
    program: Program, sites: CacheSites, data: Callable[[], Batches], window: int
) -> None:
    """Refuses data on which a window hides what latents lose.

    Raises:
        DataError: no row has twice as many tokens as the window.
    """
    sides = [side for side in sites.found.values() if isinstance(side, CacheSide)]
    if not sides:
        return
    ports = zip(program.signature.inputs, program.inputs, strict=True)
    axes = {
        port.name: axis
        for port, node in ports
        for axis, size in enumerate(node.meta["val"].shape)
        if ops.expression(size) == sides[0].seq
    }
    found = [b[name].shape[axis] for b in data() for name, axis in axes.items() if name in b]
    if found and max(found) < 2 * window:
        raise DataError(
            f"rows of at most {max(found)} tokens, and a window of {window}",
            hint="give longer rows (--length), or a smaller window: latents are read beyond it",
        )


def turned(factors: Factors) -> tuple[Factors, Factors]:
    """Returns the same factors with other latents, and an orthogonal basis that begins with those.

    In that basis, latents with zeros behind them are what they give back, less the mean.

    Returns:
        factors with orthonormal columns of `up`, and the basis: `down` `[groups, width, width]` is
        the transpose of `up`, and the mean is that of the factors.
    """
    basis, triangle = torch.linalg.qr(factors.up, mode="complete")
    rank = factors.rank
    latent = Factors(triangle[:, :rank] @ factors.down, basis[:, :, :rank], factors.mean)
    return latent, Factors(basis.mT, basis, factors.mean)


def _in_basis(draft: Draft, cache: CacheSide, latent: Factors, basis: Factors) -> _Halves:
    """Both halves less the mean: it moves no scores, and values get it back behind the attention.

    So the far half is latents with zeros behind them.
    """
    folded, name = cache.is_moved_only, cache.side.linear.weight
    new = make_latent(draft, cache, basis, cache.new, folded=folded)
    if basis.mean is not None and bool(basis.mean.any()):
        row = as_typed((basis.down @ basis.mean.unsqueeze(2)).mT, cache.new)
        mean = draft.weight(name, f"{cache.side.kind}_mean", row)
        new = draft.call(aten.sub.Tensor, new, mean)
    short = make_latent(draft, cache, latent, cache.new, folded=folded)
    join, resized = join_kept(draft, cache, latent, short)
    gap = cache.width - latent.rank
    if not gap:
        return _Halves(join, join, new, resized)
    batch, total = (draft.call(aten.sym_size.int, join, axis) for axis in (0, 2))
    zeros = draft.call(aten.new_zeros.default, join, [batch, latent.groups, total, gap])
    return _Halves(join, draft.call(aten.cat.default, [join, zeros], 3), new, resized)


def _rebuilt(draft: Draft, cache: CacheSide, factors: Factors, size: int) -> _Halves:
    latent = make_latent(draft, cache, factors, cache.split, folded=cache.is_split_plain)
    join, resized = join_kept(draft, cache, factors, latent)
    far = restored(draft, cache, factors, join, size, cache.split)
    if cache.way:
        far = again(draft, cache, join, far)
    return _Halves(join, far, Ref(cache.new.name), resized)


def _restored(draft: Draft, cache: CacheSide, factors: Factors, size: int) -> _Halves:
    latent = make_latent(draft, cache, factors, cache.new, folded=cache.is_moved_only)
    join, resized = join_kept(draft, cache, factors, latent)
    far = restored(draft, cache, factors, join, size, cache.new)
    return _Halves(join, far, Ref(cache.new.name), resized)


def _recent(draft: Draft, cache: CacheSide, new: Ref, lengths: Lengths) -> tuple[AddState, Ref]:
    """The state of the window, and its tokens with the new ones, `[batch, heads, n, width]`."""
    source, result = cache.state
    name, sizes = f"{cache.past.name}_recent", {1: cache.heads, 3: cache.width}
    kept = draft.limited(name, cache.past, 2, lengths.window, sizes)
    near = draft.call(aten.cat.default, [kept, new], 2)
    left = draft.call(aten.slice.Tensor, near, 2, lengths.left, END)
    edit = AddState(
        f"{source}_recent", f"{result}_recent", source, name, left.name, 2, lengths.window, sizes
    )
    return edit, near
