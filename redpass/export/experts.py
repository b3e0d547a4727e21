"""ONNX forms of what mixtures of experts are made of: tokens sorted by expert, one product each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx_ir as ir
from torch import fx

from redpass import ops
from redpass.export.emitter import Emitter
from redpass.export.pointwise import cast, operand
from redpass.export.sizes import UntranslatedError, shape_of, type_of


def sort(e: Emitter, node: fx.Node) -> tuple[ir.Value, ...]:
    """All of an axis in order, with its places; TopK keeps equal elements in order."""
    axis = int(ops.argument(node, "dim"))
    largest = int(bool(ops.argument(node, "descending")))
    size = e.size(shape_of(node.args[0])[axis])
    return tuple(e.calls("TopK", 2, e.value(node.args[0]), size, axis=axis, largest=largest))


def count(e: Emitter, node: fx.Node) -> ir.Value:
    """`histc` of whole numbers with one bin each: how often each number occurs."""
    bins, low, high = (ops.argument(node, name) for name in ("bins", "min", "max"))
    source = node.args[0]
    whole = isinstance(source, fx.Node) and ops.is_call(source, "to", "_to_copy")
    before = source.args[0] if isinstance(source, fx.Node) and whole else None
    integral = isinstance(before, fx.Node) and type_of(before) == ir.DataType.INT64
    if not isinstance(before, fx.Node) or not integral or (low, high) != (0, bins - 1):
        raise UntranslatedError("a histogram of other than whole numbers")
    column = e.call("Unsqueeze", e.value(before), e.constant([-1]))
    hits = e.call("Equal", column, e.constant(range(bins)))
    rows = e.call("Cast", hits, to=type_of(node))
    return e.call("ReduceSum", rows, e.constant([0]), keepdims=0)


def put(e: Emitter, node: fx.Node) -> ir.Value:
    """`index_put` on one axis of a vector."""
    places = ops.argument(node, "indices")
    if len(places) != 1 or len(shape_of(node)) != 1 or ops.argument(node, "accumulate"):
        raise UntranslatedError("index_put on more than a vector")
    place = operand(e, places[0], ir.DataType.INT64)
    new = e.expand(operand(e, ops.argument(node, "values"), type_of(node)), shape_of(places[0]))
    return e.call("ScatterElements", e.value(node.args[0]), place, new, axis=0)


def grouped_product(e: Emitter, node: fx.Node) -> ir.Value:
    """Rows sorted by expert times each expert's matrix; `offs` is where each one's rows end."""
    rows, weight, ends = node.args[:3]
    experts = shape_of(weight)[0]
    if not isinstance(experts, int) or len(shape_of(weight)) != 3 or len(shape_of(rows)) != 2:
        raise UntranslatedError("a grouped product of other ranks")
    places = cast(e, e.value(ends), ir.DataType.INT64)
    start, axis, parts = e.constant([0]), e.constant([0]), []
    for number in range(experts):
        end = e.slice(places, 0, number, number + 1)
        part = e.call("Slice", e.value(rows), start, end, axis)
        matrix = e.call("Gather", e.value(weight), e.constant(number), axis=0)
        parts.append(e.call("MatMul", part, matrix))
        start = end
    return e.call("Concat", *parts, axis=0)


TABLE: dict[str, Callable[[Emitter, fx.Node], Any]] = {
    "sort": sort,
    "histc": count,
    "index_put": put,
    "_grouped_mm": grouped_product,
    "grouped_mm": grouped_product,
    "transformers::grouped_mm_fallback": grouped_product,
}
"""ATen base name, or full name, -> translation."""
