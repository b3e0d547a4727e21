"""ONNX forms of matrix products, convolutions, norms and pools."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx_ir as ir
from torch import fx

from redpass import ops
from redpass.export.emitter import Emitter
from redpass.export.pointwise import FLOATS, operand
from redpass.export.sizes import UntranslatedError, shape_of, type_of


def linear(e: Emitter, node: fx.Node) -> ir.Value:
    """`x @ w.T + b`: a MatMul, which ONNX Runtime packs once when the weight is constant."""
    source, weight = node.args[:2]
    bias = ops.argument(node, "bias")
    found = e.call("MatMul", e.value(source), _transposed(e, weight))
    return found if bias is None else e.call("Add", found, e.value(bias))


def _transposed(e: Emitter, weight: Any) -> ir.Value:
    """Returns the transpose of a weight: stored so, unless something reads it as it is too."""
    if weight.op == "get_attr" and e.is_only_transposed(weight):
        return e.weight(weight, transposed=True)
    return e.transpose(e.value(weight), [1, 0])


def product(e: Emitter, node: fx.Node) -> ir.Value:
    """`mm`, `bmm`, `matmul`."""
    left, right = node.args[:2]
    return _product(e, node, left, right)


def _product(e: Emitter, node: fx.Node, left: Any, right: Any) -> ir.Value:
    """Multiplies; a left side flattened to a matrix is used as it was before."""
    value = e.value(left)
    source = value.producer()
    root = source.inputs[0] if source is not None and source.op_type == "Reshape" else None
    shape = e.shapes.get(root, ()) if root is not None else ()
    flat = len(shape_of(left)) == 2 and len(shape) > 2 and shape[-1] == shape_of(left)[-1]
    if not flat or right.op != "get_attr":
        return e.call("MatMul", value, e.value(right))
    found = e.call("MatMul", root, e.value(right))
    e.shapes[found] = (*shape[:-1], shape_of(node)[-1])
    return found


def add_product(e: Emitter, node: fx.Node) -> ir.Value:
    """`addmm` and `baddbmm`: `beta * c + alpha * a @ b`."""
    bias, left, right = node.args[:3]
    dtype = type_of(node)
    found = _product(e, node, left, right)
    shape = e.shapes.get(found)
    for name, value in (("alpha", "product"), ("beta", "bias")):
        if ops.argument(node, name) != 1:
            raise UntranslatedError(f"addmm with {name} on the {value}")
    total = e.call("Add", found, operand(e, bias, dtype))
    if shape is None:
        return total
    e.shapes[total] = shape
    return e.reshape(total, shape_of(node))


def einsum(e: Emitter, node: fx.Node) -> ir.Value:
    """Sums of products by letters."""
    values = [e.value(item) for item in ops.argument(node, "tensors")]
    return e.call("Einsum", *values, equation=str(ops.argument(node, "equation")))


def layer_norm(e: Emitter, node: fx.Node) -> ir.Value:
    """Layer norm over the last axes."""
    width = tuple(ops.argument(node, "normalized_shape"))
    gain, shift = _gain(e, node, width), ops.argument(node, "bias")
    shift = None if shift is None else operand(e, shift, type_of(node))
    eps = float(ops.argument(node, "eps"))
    source = operand(e, node.args[0], type_of(node))
    return e.call("LayerNormalization", source, gain, shift, axis=-len(width), epsilon=eps)


def rms_norm(e: Emitter, node: fx.Node) -> ir.Value:
    """RMS norm over the last axes; torch's eps is that of the dtype when none is given."""
    eps = ops.argument(node, "eps")
    if eps is None or type_of(node) not in FLOATS or e.opset < 23:
        raise UntranslatedError("rms_norm without eps")
    width = tuple(ops.argument(node, "normalized_shape"))
    source = operand(e, node.args[0], type_of(node))
    gain = _gain(e, node, width)
    return e.call("RMSNormalization", source, gain, axis=-len(width), epsilon=float(eps))


def _gain(e: Emitter, node: fx.Node, width: tuple[Any, ...]) -> ir.Value:
    gain = ops.argument(node, "weight")
    if gain is not None:
        return operand(e, gain, type_of(node))
    if not all(isinstance(size, int) for size in width):
        raise UntranslatedError("a norm of symbolic width without a gain")
    dtype = type_of(node)
    return e.constant([1.0] * width[0], dtype) if len(width) == 1 else _ones(e, width, dtype)


def _ones(e: Emitter, width: tuple[int, ...], dtype: ir.DataType) -> ir.Value:
    return e.call("Expand", e.constant(1.0, dtype), e.constant(list(width)))


def batch_norm(e: Emitter, node: fx.Node) -> ir.Value:
    """Batch norm with stored statistics."""
    if ops.argument(node, "training"):
        raise UntranslatedError("a batch norm in training mode")
    names = ("weight", "bias", "running_mean", "running_var")
    parts = [ops.argument(node, name) for name in names]
    if None in parts:
        raise UntranslatedError("a batch norm without gain, shift or statistics")
    values = [e.value(part) for part in parts]
    eps = float(ops.argument(node, "eps"))
    return e.call("BatchNormalization", e.value(node.args[0]), *values, epsilon=eps)


def group_norm(e: Emitter, node: fx.Node) -> ir.Value:
    """Group norm."""
    gain, shift = ops.argument(node, "weight"), ops.argument(node, "bias")
    if gain is None or shift is None:
        raise UntranslatedError("a group norm without gain or shift")
    groups, eps = int(ops.argument(node, "num_groups")), float(ops.argument(node, "eps"))
    values = (e.value(node.args[0]), e.value(gain), e.value(shift))
    return e.call("GroupNormalization", *values, num_groups=groups, epsilon=eps)


def convolution(e: Emitter, node: fx.Node) -> ir.Value:
    """Convolutions of one, two and three dimensions."""
    rank = len(shape_of(node)) - 2
    stride, dilation = (_each(ops.argument(node, name), rank) for name in ("stride", "dilation"))
    padding = ops.argument(node, "padding")
    if isinstance(padding, str):
        raise UntranslatedError("a convolution whose padding has a name")
    bias = ops.argument(node, "bias")
    values = [e.value(node.args[0]), e.value(node.args[1])]
    values += [] if bias is None else [e.value(bias)]
    return e.call(
        "Conv",
        *values,
        strides=stride,
        pads=_each(padding, rank) * 2,
        dilations=dilation,
        group=int(ops.argument(node, "groups")),
        kernel_shape=[int(size) for size in shape_of(node.args[1])[2:]],
    )


def pool(op: str) -> Callable[[Emitter, fx.Node], ir.Value]:
    """Translates max and average pools."""

    def translate(e: Emitter, node: fx.Node) -> ir.Value:
        rank = len(shape_of(node)) - 2
        kernel = _each(ops.argument(node, "kernel_size"), rank)
        stride = _each(ops.argument(node, "stride") or kernel, rank)
        extra: dict[str, Any] = {}
        if op == "MaxPool":
            extra["dilations"] = _each(ops.argument(node, "dilation"), rank)
        else:
            extra["count_include_pad"] = int(bool(ops.argument(node, "count_include_pad")))
        return e.call(
            op,
            e.value(node.args[0]),
            kernel_shape=kernel,
            strides=stride,
            pads=_each(ops.argument(node, "padding"), rank) * 2,
            ceil_mode=int(bool(ops.argument(node, "ceil_mode"))),
            **extra,
        )

    return translate


def adaptive_average(e: Emitter, node: fx.Node) -> ir.Value:
    """Adaptive average pool to one element an axis."""
    size = ops.argument(node, "output_size")
    if any(length != 1 for length in _each(size, 1)):
        raise UntranslatedError("an adaptive pool to more than one element")
    return e.call("GlobalAveragePool", e.value(node.args[0]))


def _each(item: Any, rank: int) -> list[int]:
    found = [item] if isinstance(item, int) else [int(size) for size in item]
    return found * rank if len(found) == 1 else found


TABLE: dict[str, Callable[[Emitter, fx.Node], Any]] = (
    dict.fromkeys(("mm", "bmm", "matmul"), product)
    | dict.fromkeys(("addmm", "baddbmm"), add_product)
    | dict.fromkeys(("conv1d", "conv2d", "conv3d"), convolution)
    | dict.fromkeys(("max_pool1d", "max_pool2d", "max_pool3d"), pool("MaxPool"))
    | dict.fromkeys(("avg_pool1d", "avg_pool2d", "avg_pool3d"), pool("AveragePool"))
    | dict.fromkeys(("adaptive_avg_pool1d", "adaptive_avg_pool2d"), adaptive_average)
    | {
        "linear": linear, "einsum": einsum, "layer_norm": layer_norm, "rms_norm": rms_norm,
        "batch_norm": batch_norm, "group_norm": group_norm,
    }
)  # fmt: skip
"""ATen base name -> translation."""
