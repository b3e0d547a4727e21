"""ONNX forms of reductions, softmaxes, running sums and rankings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx_ir as ir
from torch import fx

from redpass import ops
from redpass.export.emitter import Emitter
from redpass.export.pointwise import binary, operand
from redpass.export.sizes import UntranslatedError, shape_of, size_of, type_of


def reduce(op: str) -> Callable[[Emitter, fx.Node], Any]:
    """Translates a reduction over some or all axes."""

    def translate(e: Emitter, node: fx.Node) -> Any:
        source = node.args[0]
        if not isinstance(source, fx.Node) or isinstance(node.meta["val"], tuple):
            raise UntranslatedError(f"{ops.base_name(node)} with places")
        boolean = op in ("ReduceMin", "ReduceMax") and type_of(node) == ir.DataType.BOOL
        dtype = ir.DataType.INT32 if boolean else type_of(node)
        dims, keep = _dims(node, len(shape_of(source)))
        axes = None if dims is None else e.constant(dims)
        found = e.call(op, operand(e, source, dtype), axes, keepdims=int(keep))
        return e.cast(found, ir.DataType.BOOL) if boolean else found

    return translate


def _dims(node: fx.Node, rank: int) -> tuple[list[int] | None, bool]:
    try:
        dims = ops.argument(node, "dim")
    except KeyError:
        return None, False
    keep = bool(ops.argument(node, "keepdim"))
    if dims is None or dims == []:
        return None, keep
    found = [dims] if isinstance(dims, int) else list(dims)
    return [axis % rank for axis in found], keep


def softmax(op: str) -> Callable[[Emitter, fx.Node], ir.Value]:
    """Translates a softmax of any spelling."""

    def translate(e: Emitter, node: fx.Node) -> ir.Value:
        axis = int(ops.argument(node, "dim"))
        return e.call(op, operand(e, node.args[0], type_of(node)), axis=axis)

    return translate


def cumsum(e: Emitter, node: fx.Node) -> ir.Value:
    """Running sum."""
    axis = e.constant(int(ops.argument(node, "dim")))
    return e.call("CumSum", operand(e, node.args[0], type_of(node)), axis)


def argmax(op: str) -> Callable[[Emitter, fx.Node], ir.Value]:
    """Translates the place of an extreme along one axis."""

    def translate(e: Emitter, node: fx.Node) -> ir.Value:
        dim, keep = ops.argument(node, "dim"), int(bool(ops.argument(node, "keepdim")))
        if dim is None:
            raise UntranslatedError(f"{ops.base_name(node)} over all axes")
        return e.call(op, e.value(node.args[0]), axis=dim, keepdims=keep)

    return translate


def extreme(op: str) -> Callable[[Emitter, fx.Node], Any]:
    """Translates `max` and `min`: of two tensors, over all elements, or along one axis."""

    def translate(e: Emitter, node: fx.Node) -> Any:
        overload = str(node.target).rsplit(".", 1)[-1]
        if overload == "other":
            return binary(op)(e, node)
        if overload == "dim":
            dim, keep = ops.argument(node, "dim"), int(bool(ops.argument(node, "keepdim")))
            value = e.value(node.args[0])
            best = e.call(f"Reduce{op}", value, e.constant([dim]), keepdims=keep)
            return best, e.call(f"Arg{op}", value, axis=dim, keepdims=keep)
        return reduce(f"Reduce{op}")(e, node)

    return translate


def topk(e: Emitter, node: fx.Node) -> Any:
    """The k largest or smallest along one axis, with their places."""
    k = e.size(size_of(ops.argument(node, "k")))
    largest = int(bool(ops.argument(node, "largest")))
    axis = int(ops.argument(node, "dim"))
    return tuple(e.calls("TopK", 2, e.value(node.args[0]), k, axis=axis, largest=largest))


_REDUCE = {
    "mean": "ReduceMean", "sum": "ReduceSum", "amax": "ReduceMax", "amin": "ReduceMin",
    "prod": "ReduceProd", "any": "ReduceMax", "all": "ReduceMin", "logsumexp": "ReduceLogSumExp",
}  # fmt: skip

TABLE: dict[str, Callable[[Emitter, fx.Node], Any]] = {
    name: reduce(op) for name, op in _REDUCE.items()
} | {
    "softmax": softmax("Softmax"), "_softmax": softmax("Softmax"),
    "log_softmax": softmax("LogSoftmax"), "cumsum": cumsum, "argmax": argmax("ArgMax"),
    "argmin": argmax("ArgMin"), "max": extreme("Max"), "min": extreme("Min"), "topk": topk,
}  # fmt: skip
"""ATen base name -> translation."""
