"""ONNX forms of operations that pick elements by place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx_ir as ir
from torch import fx

from redpass import ops
from redpass.export.emitter import Emitter
from redpass.export.pointwise import operand
from redpass.export.sizes import Size, UntranslatedError, axis_of, shape_of, size_of, type_of


def embedding(e: Emitter, node: fx.Node) -> ir.Value:
    """Rows of a table."""
    return e.call("Gather", e.value(node.args[0]), e.value(node.args[1]), axis=0)


def gather(e: Emitter, node: fx.Node) -> ir.Value:
    """Elements along one axis; torch's index may be smaller than its source elsewhere."""
    source, index = node.args[0], ops.argument(node, "index")
    value, axis = e.value(source), axis_of(node)
    for other, (have, want) in enumerate(zip(shape_of(source), shape_of(index), strict=True)):
        if other != axis and have != want:
            value = e.slice(value, other, 0, want)
    return e.call("GatherElements", value, e.value(index), axis=axis)


def index_select(e: Emitter, node: fx.Node) -> ir.Value:
    """Slices along one axis by a list of places."""
    index = e.value(ops.argument(node, "index"))
    return e.call("Gather", e.value(node.args[0]), index, axis=axis_of(node))


def index(e: Emitter, node: fx.Node) -> ir.Value:
    """Indexing by integer tensors: a view where the tensors count, else a gather."""
    source, places = node.args[0], list(ops.argument(node, "indices"))
    given = [axis for axis, place in enumerate(places) if place is not None]
    if any(type_of(places[axis]) == ir.DataType.BOOL for axis in given):
        raise UntranslatedError("indexing by a boolean mask: the size depends on the data")
    shape = shape_of(source)
    axes = [_counted_axis(places[axis], shape[axis]) for axis in given]
    ranks = {len(shape_of(places[axis])) for axis in given}
    in_order = None not in axes and sorted({axis for axis in axes if axis is not None}) == axes
    if given == list(range(len(shape))) and in_order and len(ranks) == 1:
        return e.reshape(e.value(source), shape_of(node))
    if len(given) == 1:
        place = operand(e, places[given[0]], ir.DataType.INT64)
        return e.call("Gather", e.value(source), place, axis=given[0])
    if given != list(range(len(given))):
        raise UntranslatedError("indexing by tensors on some later axes")
    return _gather_by_all(e, node, [places[axis] for axis in given])


def _gather_by_all(e: Emitter, node: fx.Node, places: list[fx.Node]) -> ir.Value:
    rest = len(shape_of(node.args[0])) - len(places)
    shape = shape_of(node)
    wide = shape[: len(shape) - rest]
    parts = []
    for place in places:
        value = e.expand(operand(e, place, ir.DataType.INT64), wide)
        parts.append(e.reshape(value, (*wide, 1)))
    return e.call("GatherND", e.value(node.args[0]), e.call("Concat", *parts, axis=-1))


def _counted_axis(place: fx.Node, size: Size) -> int | None:
    """Returns the one long axis of an index that counts 0, 1, ... up to `size`, else None."""
    found, shape = place, shape_of(place)
    while ops.is_call(found, "unsqueeze", "view", "reshape", "slice", "add", "to", "contiguous"):
        if ops.is_call(found, "add") and found.args[1] != 0:
            return None
        before = found.args[0]
        if not isinstance(before, fx.Node) or _long(before) != _long(place):
            return None
        found = before
    starts = [size_of(found.args[0])] if ops.is_call(found, "arange") else [None]
    if starts != [size] or len(found.args) != 1:
        return None
    axes = [axis for axis, length in enumerate(shape) if length == size]
    return axes[0] if len(axes) == 1 else None


def _long(node: fx.Node) -> list[Size]:
    return [size for size in shape_of(node) if size != 1]


TABLE: dict[str, Callable[[Emitter, fx.Node], Any]] = {
    "embedding": embedding,
    "gather": gather,
    "index_select": index_select,
    "index": index,
}
"""ATen base name -> translation."""
