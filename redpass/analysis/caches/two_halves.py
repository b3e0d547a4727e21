"""One attention over two halves: all positions from latents, and the latest ones in full.

The keys and the values of an attention may each be kept in that way or not, by actions of their
own; the halves and the masks are made once, by whichever action comes first.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass

import torch
from torch import fx

from redpass import ops
from redpass.analysis.caches.sites import CacheSide
from redpass.analysis.drafts import END, Draft
from redpass.analysis.heads.axes import Unfit, named
from redpass.plan import Edit, Once, Ref, SetArgument, SetCall

aten = torch.ops.aten
OTHER = {"key": "value", "value": "key"}


@dataclass(frozen=True)
class Lengths:
    """Counts of positions, as nodes.

    Attributes:
        window: how many of the latest tokens are kept in full, at most.
        past: positions given.
        seq: new ones.
        total: both.
        first: the first position that the second half has, `past - min(window, past)`.
        left: how many of the second half's positions are not kept for the next call.
    """

    window: int
    past: Ref
    seq: Ref
    total: Ref
    first: Ref
    left: Ref

    @staticmethod
    def of(draft: Draft, cache: CacheSide, window: int) -> Lengths:
        """Puts them down. Raises `Unfit` where no input has an axis for the new positions."""
        past = draft.call(aten.sym_size.int, Ref(cache.past.name), 2)
        seq = _new_positions(draft, cache)
        total = draft.call(operator.add, past, seq)
        recent = draft.call(torch.sym_min, window, past)
        given = draft.call(operator.add, recent, seq)
        first = draft.call(operator.sub, past, recent)
        kept = draft.call(torch.sym_min, window, total)
        left = draft.call(operator.sub, given, kept)
        return Lengths(window, past, seq, total, first, left)


def _new_positions(draft: Draft, cache: CacheSide) -> Ref:
    for node in draft.program.inputs:
        for axis, size in enumerate(getattr(node.meta["val"], "shape", ())):
            if ops.expression(size) == cache.seq:
                return draft.call(aten.sym_size.int, Ref(node.name), axis)
    raise Unfit("no input has an axis for the new positions")


def two_halves(draft: Draft, cache: CacheSide, lengths: Lengths, far: Ref, near: Ref) -> Once:
    """Lets the attention read both halves of one side, and of the other side what it has twice.

    Args:
        far: all positions, as the attention's operand.
        near: the latest positions, likewise.
    """
    core, kind = cache.site.core.node, cache.side.kind
    other = cache.site.sides[OTHER[kind]].node
    stem = f"{core.name}_window{lengths.window}"
    draft.edits, draft.before = [], core
    mask = _mask(draft, core, lengths)
    both = draft.put(f"{stem}_{kind}", aten.cat.default, [far, near], 2)
    latest = draft.put(
        f"{stem}_{OTHER[kind]}_near", aten.slice.Tensor, Ref(other.name), 2, lengths.first, END
    )
    others = draft.put(f"{stem}_{OTHER[kind]}", aten.cat.default, [Ref(other.name), latest], 2)
    first = [
        *draft.edits,
        _read_mask(core, mask),
        SetArgument(core.name, cache.operand.name, both.name),
        SetArgument(core.name, other.name, others.name),
    ]
    later = (
        SetArgument(both.name, cache.operand.name, far.name),
        SetArgument(both.name, f"{stem}_{kind}_near", near.name),
    )
    return Once(stem, tuple(first), later)


def _mask(draft: Draft, core: fx.Node, lengths: Lengths) -> Ref:
    """The attention's mask over both halves; each pair of positions is open in one at most."""
    call = draft.call
    rows = call(aten.arange.default, lengths.seq)
    oldest = call(aten.add.Tensor, call(aten.add.Tensor, rows, lengths.past), -lengths.window)
    places = call(aten.arange.default, lengths.total)
    far = call(aten.lt.Tensor, places, call(aten.unsqueeze.default, oldest, 1))
    near = call(aten.logical_not.default, call(aten.slice.Tensor, far, 1, lengths.first, END))
    given = ops.argument(core, "attn_mask")
    if given is None:
        return call(aten.cat.default, [far, near], 1)
    parts = (Ref(given.name), call(aten.slice.Tensor, Ref(given.name), -1, lengths.first, END))
    if given.meta["val"].dtype is torch.bool:
        made = [
            call(aten.logical_and.default, *pair) for pair in zip(parts, (far, near), strict=True)
        ]
    else:
        hidden = float("-inf")
        made = [
            call(aten.masked_fill.Scalar, part, call(aten.logical_not.default, seen), hidden)
            for part, seen in zip(parts, (far, near), strict=True)
        ]
    return call(aten.cat.default, made, -1)


def _read_mask(core: fx.Node, mask: Ref) -> Edit:
    given = ops.argument(core, "attn_mask")
    if given is not None:
        return SetArgument(core.name, given.name, mask.name)
    args, kwargs = named((core.args, dict(core.kwargs)))
    if len(args) > 3:
        return SetCall(core.name, (*args[:3], mask, *args[4:]), kwargs)
    return SetCall(core.name, args, {**kwargs, "attn_mask": mask})
