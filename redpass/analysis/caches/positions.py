"""Computing for all kept positions what a graph computes for the new ones: rotated keys, tables.

Keys that are rebuilt from what a cache holds must be rotated where they stand. The ops between
are put down once more on `past + seq` positions, and so are the tables they read, back to where
positions come from:

    arange(seq) + past                  ->   arange(past + seq)
    slice(table, past, past + seq)      ->   slice(table, 0, past + seq)
    an input `position_ids` [b, seq]    ->   counted back from its first one, over `attention_mask`

The last one is how every caller fills it that pads by a mask: kept positions that are not masked
count up one by one to the first new one. A model whose tables come from elsewhere is left alone.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx

from redpass import ops
from redpass.analysis.caches.sites import CacheSide
from redpass.analysis.drafts import END, Draft
from redpass.analysis.heads.axes import Unfit
from redpass.plan import Ref

aten = torch.ops.aten


class AllPositions:
    """Puts down values for all positions of one cache.

    Args:
        total: a size node: positions given and new.
        length: a size node: positions given.
    """

    def __init__(self, draft: Draft, cache: CacheSide, total: Ref, length: Ref) -> None:
        self.draft, self.cache, self.total, self.length = draft, cache, total, length
        self.seq, self.past = cache.seq, cache.past_length
        self.known: dict[fx.Node, Any] = {}

    def of(self, node: fx.Node) -> Any:
        """Returns what stands for `node` when all positions are asked for.

        Raises:
            Unfit: it depends on the new positions in a way that is not understood.
        """
        if node not in self.known:
            self.known[node] = self._made(node)
        return self.known[node]

    def _made(self, node: fx.Node) -> Any:
        if ops.is_size(node):
            return self._size(node)
        value = node.meta.get("val")
        if not isinstance(value, Tensor) or not self._is_new(value):
            return Ref(node.name)
        if node.op == "placeholder":
            return self._positions(node)
        if node.op != "call_function" or not ops.is_pure(node):
            raise Unfit(f"'{node.name}' cannot be computed for positions that were kept")
        return self.draft.call(node.target, *self._arguments(node), **self._all(node.kwargs))  # type: ignore[arg-type]

    def _is_new(self, value: Tensor) -> bool:
        """Whether it holds something for each new position, and for those only."""
        sizes = [ops.expression(size) for size in value.shape]
        symbols: list[Any] = [getattr(size, "free_symbols", set()) for size in sizes]
        new = self.seq.free_symbols
        return any(new & found and self.past not in found for found in symbols)

    def _arguments(self, node: fx.Node) -> tuple[Any, ...]:
        if ops.is_call(node, "slice") and self._is_past(ops.argument(node, "start")):
            dim, end = ops.argument(node, "dim"), ops.argument(node, "end")
            return self.of(node.args[0]), dim, 0, self._all(end)  # type: ignore[arg-type]
        if ops.is_call(node, "add") and self._is_past(node.args[1]):
            return self.of(node.args[0]), 0  # type: ignore[arg-type]
        if ops.is_call(node, "arange") and self._is_past(node.args[0]) and len(node.args) > 1:
            return (0, *(self._all(arg) for arg in node.args[1:]))
        return tuple(self._all(arg) for arg in node.args)

    def _all(self, item: Any) -> Any:
        return fx.node.map_arg(item, self.of)

    def _is_past(self, item: Any) -> bool:
        return (
            isinstance(item, fx.Node) and ops.is_size(item) and self._expression(item) == self.past
        )

    def _expression(self, node: fx.Node) -> Any:
        return ops.expression(node.meta["val"])

    def _size(self, node: fx.Node) -> Any:
        found = self._expression(node)
        symbols: Any = getattr(found, "free_symbols", set())
        if (
            not symbols & (self.seq.free_symbols | self.past.free_symbols)
            or found == self.seq + self.past
        ):
            return Ref(node.name)
        if found == self.seq:
            return self.total
        is_known = node.target in ops.SIZE_FUNCTIONS and node.target is not operator.sub
        if is_known and not symbols & self.past.free_symbols:
            return self.draft.call(node.target, *self._all(node.args))  # type: ignore[arg-type]
        raise Unfit(f"the size '{node.name}' is not understood for positions that were kept")

    def _positions(self, node: fx.Node) -> Ref:
        """Positions of everything kept, from those of what is new and the mask over both."""
        value = node.meta["val"]
        names = [port.name for port in self.draft.program.signature.inputs]
        name = names[self.draft.program.inputs.index(node)]
        fits = value.dim() == 2 and ops.expression(value.shape[1]) == self.seq
        if "position" not in name or not fits or value.is_floating_point():
            raise Unfit(
                f"its tables are made from the input '{name}', which kept positions have not"
            )
        call = self.draft.call
        first = call(aten.slice.Tensor, Ref(node.name), 1, 0, 1)
        mask = self._mask(value)
        if mask is None:
            counted = call(aten.arange.default, self.length, dtype=value.dtype)
            back = call(aten.sub.Tensor, counted, self.length)
        else:
            counted = call(aten.cumsum.default, Ref(mask.name), 1)
            given = call(aten.slice.Tensor, counted, 1, 0, self.length)
            here = call(aten.slice.Tensor, counted, 1, self.length, END)
            back = call(aten.sub.Tensor, given, call(aten.slice.Tensor, here, 1, 0, 1))
        return call(aten.cat.default, [call(aten.add.Tensor, back, first), Ref(node.name)], 1)

    def _mask(self, positions: Tensor) -> fx.Node | None:
        """The input that masks given and new positions, with a number for each."""
        for node in self.draft.program.inputs:
            value = node.meta["val"]
            if "mask" not in node.name or value.dim() != 2 or value.is_floating_point():
                continue
            sizes = [ops.expression(size) for size in value.shape]
            if sizes == [ops.expression(positions.shape[0]), self.seq + self.past]:
                return node
        return None
