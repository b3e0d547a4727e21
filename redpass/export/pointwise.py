"""ONNX forms of elementwise operations, casts and comparisons."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, fx

from redpass import ops
from redpass.export.emitter import Emitter
from redpass.export.sizes import UntranslatedError, type_of

FLOATS = (ir.DataType.FLOAT, ir.DataType.DOUBLE)


def operand(e: Emitter, item: Any, dtype: ir.DataType) -> ir.Value:
    """Returns a tensor, a number or a symbolic size as a tensor of element type `dtype`."""
    if not (isinstance(item, fx.Node) and isinstance(item.meta["val"], Tensor)):
        return e.scalar(item, dtype)
    value = e.value(item)
    return value if type_of(item) == dtype else cast(e, value, dtype)


def cast(e: Emitter, value: ir.Value, dtype: ir.DataType) -> ir.Value:
    """Converts a value once for all who ask."""
    return e.once(("cast", value, dtype), lambda: e.cast(value, dtype))


def common_type(node: fx.Node, *items: Any) -> ir.DataType:
    """Returns the element type a comparison of `items` is made in, as torch promotes them."""
    samples: list[Any] = []
    for item in items:
        value = item.meta.get("val") if isinstance(item, fx.Node) else item
        if isinstance(value, Tensor):
            samples.append(torch.empty((1,) * min(value.dim(), 1), dtype=value.dtype))
        elif isinstance(value, torch.SymInt | int | float | bool):
            samples.append(value if not isinstance(value, torch.SymInt) else 1)
        else:
            raise UntranslatedError(f"an operand of '{node.name}'")
    if len(samples) == 1:
        return type_of(samples[0].dtype)
    return type_of(torch.result_type(*samples))


def unary(op: str) -> Callable[[Emitter, fx.Node], ir.Value]:
    """Translates to one ONNX operator; integers are converted first where torch does it."""
    return lambda e, node: e.call(op, operand(e, node.args[0], type_of(node)))


def binary(op: str) -> Callable[[Emitter, fx.Node], ir.Value]:
    """Translates to one ONNX operator on operands of the result's type."""

    def translate(e: Emitter, node: fx.Node) -> ir.Value:
        dtype = type_of(node)
        left, right = (operand(e, item, dtype) for item in node.args[:2])
        if (alpha := node.kwargs.get("alpha", 1)) != 1:
            right = e.call("Mul", right, e.scalar(alpha, dtype))
        return e.call(op, left, right)

    return translate


def compare(op: str, negated: bool = False) -> Callable[[Emitter, fx.Node], ir.Value]:
    """Translates a comparison, made in the type torch promotes its operands to."""

    def translate(e: Emitter, node: fx.Node) -> ir.Value:
        dtype = common_type(node, *node.args[:2])
        if dtype == ir.DataType.BOOL and op != "Equal":
            dtype = ir.DataType.INT32
        found = e.call(op, *(operand(e, item, dtype) for item in node.args[:2]))
        return e.call("Not", found) if negated else found

    return translate


def logic(op: str) -> Callable[[Emitter, fx.Node], ir.Value]:
    """Translates a logical operation; bitwise ones only on booleans."""

    def translate(e: Emitter, node: fx.Node) -> ir.Value:
        logical = ops.base_name(node).startswith("logical")
        if type_of(node) != ir.DataType.BOOL:
            raise UntranslatedError(f"'{ops.base_name(node)}' on integers")
        if not logical and any(type_of(n) != ir.DataType.BOOL for n in node.all_input_nodes):
            raise UntranslatedError(f"'{ops.base_name(node)}' on integers")
        operands = node.args[: 1 if op == "Not" else 2]
        return e.call(op, *(operand(e, item, ir.DataType.BOOL) for item in operands))

    return translate


def divide(e: Emitter, node: fx.Node) -> ir.Value:
    """Division, true, floored or truncated."""
    mode = node.kwargs.get("rounding_mode")
    if mode is None:
        return binary("Div")(e, node)
    return _rounded(e, node, str(mode))


def floor_divide(e: Emitter, node: fx.Node) -> ir.Value:
    """Floored division."""
    return _rounded(e, node, "floor")


def _rounded(e: Emitter, node: fx.Node, mode: str) -> ir.Value:
    dtype = type_of(node)
    left, right = (operand(e, item, dtype) for item in node.args[:2])
    if dtype in FLOATS:
        quotient = e.call("Div", left, right)
        if mode == "floor":
            return e.call("Floor", quotient)
        raise UntranslatedError("a truncated division of floats")
    if mode == "trunc":
        return e.call("Div", left, right)
    # ONNX truncates integers: taking the remainder of the divisor's sign off first floors.
    return e.call("Div", e.call("Sub", left, e.call("Mod", left, right)), right)


def remainder(e: Emitter, node: fx.Node) -> ir.Value:
    """Remainder with the sign of the divisor."""
    if type_of(node) in FLOATS:
        raise UntranslatedError("a remainder of floats")
    return binary("Mod")(e, node)


def reversed_subtract(e: Emitter, node: fx.Node) -> ir.Value:
    """`other - self`."""
    left, right = (operand(e, item, type_of(node)) for item in node.args[:2])
    return e.call("Sub", right, left)


def power(e: Emitter, node: fx.Node) -> ir.Value:
    """Powers; a square is a product, which ONNX Runtime computes faster."""
    dtype, (base, exponent) = type_of(node), node.args[:2]
    value = operand(e, base, dtype)
    if exponent == 2:
        return e.call("Mul", value, value)
    if exponent == 0.5:
        return e.call("Sqrt", value)
    return e.call("Pow", value, operand(e, exponent, dtype))


def rsqrt(e: Emitter, node: fx.Node) -> ir.Value:
    """`1 / sqrt(x)`."""
    return e.call("Reciprocal", unary("Sqrt")(e, node))


def silu(e: Emitter, node: fx.Node) -> ir.Value:
    """`x * sigmoid(x)`, in the order ONNX Runtime makes one kernel of."""
    value = operand(e, node.args[0], type_of(node))
    return e.call("Mul", value, e.call("Sigmoid", value))


def gelu(e: Emitter, node: fx.Node) -> ir.Value:
    """Gaussian error linear unit, exact or by tanh."""
    approximate = str(ops.argument(node, "approximate"))
    value = operand(e, node.args[0], type_of(node))
    return e.call("Gelu", value, approximate=approximate)


def softplus(e: Emitter, node: fx.Node) -> ir.Value:
    """`log(1 + exp(x))`, the value itself above torch's threshold."""
    if (ops.argument(node, "beta"), ops.argument(node, "threshold")) != (1, 20):
        raise UntranslatedError("softplus with other than its usual beta and threshold")
    return e.call("Softplus", e.value(node.args[0]))


def convert(e: Emitter, node: fx.Node) -> ir.Value:
    """Casts of all spellings; one that changes nothing in the file is left out."""
    source = node.args[0]
    if not isinstance(source, fx.Node):
        return e.scalar(source, type_of(node))
    return operand(e, source, type_of(node))


def where(e: Emitter, node: fx.Node) -> ir.Value:
    """Chooses by a condition."""
    condition, yes, no = node.args[:3]
    dtype = type_of(node)
    return e.call(
        "Where",
        operand(e, condition, ir.DataType.BOOL),
        operand(e, yes, dtype),
        operand(e, no, dtype),
    )


def masked_fill(e: Emitter, node: fx.Node) -> ir.Value:
    """Writes a number where a mask is set."""
    source, mask, fill = node.args[:3]
    dtype = type_of(node)
    return e.call(
        "Where", operand(e, mask, ir.DataType.BOOL), operand(e, fill, dtype), e.value(source)
    )


def clamp(e: Emitter, node: fx.Node) -> ir.Value:
    """Bounds below and above; either may be absent."""
    value, dtype, name = operand(e, node.args[0], type_of(node)), type_of(node), ops.base_name(node)
    for bound, op in (("min", "Max"), ("max", "Min")):
        limit = ops.argument(node, bound) if name in ("clamp", f"clamp_{bound}") else None
        if limit is not None:
            value = e.call(op, value, operand(e, limit, dtype))
    return value


_UNARY = {
    "exp": "Exp", "log": "Log", "sqrt": "Sqrt", "neg": "Neg", "abs": "Abs", "sin": "Sin",
    "cos": "Cos", "tan": "Tan", "tanh": "Tanh", "sigmoid": "Sigmoid", "relu": "Relu", "erf": "Erf",
    "floor": "Floor", "ceil": "Ceil", "round": "Round", "reciprocal": "Reciprocal", "sign": "Sign",
    "hardswish": "HardSwish", "mish": "Mish", "atan": "Atan", "sinh": "Sinh", "cosh": "Cosh",
}  # fmt: skip
_BINARY = {"add": "Add", "sub": "Sub", "mul": "Mul", "maximum": "Max", "minimum": "Min"}
_COMPARE = {"eq": "Equal", "lt": "Less", "le": "LessOrEqual", "gt": "Greater",
            "ge": "GreaterOrEqual"}  # fmt: skip
_LOGIC = {
    "__and__": "And", "bitwise_and": "And", "logical_and": "And", "__or__": "Or",
    "bitwise_or": "Or", "logical_or": "Or", "__xor__": "Xor", "bitwise_xor": "Xor",
    "logical_xor": "Xor", "bitwise_not": "Not", "logical_not": "Not",
}  # fmt: skip

TABLE: dict[str, Callable[[Emitter, fx.Node], Any]] = (
    {name: unary(op) for name, op in _UNARY.items()}
    | {name: binary(op) for name, op in _BINARY.items()}
    | {name: compare(op) for name, op in _COMPARE.items()}
    | {name: logic(op) for name, op in _LOGIC.items()}
    | dict.fromkeys(("to", "_to_copy", "type_as", "float", "contiguous", "clone", "detach",
                     "alias", "dropout", "lift_fresh_copy"), convert)
    | {
        "ne": compare("Equal", negated=True), "div": divide, "floor_divide": floor_divide,
        "remainder": remainder, "rsub": reversed_subtract, "pow": power, "rsqrt": rsqrt,
        "square": lambda e, node: e.call("Mul", *[e.value(node.args[0])] * 2), "silu": silu,
        "gelu": gelu, "softplus": softplus, "where": where, "masked_fill": masked_fill,
        "clamp": clamp, "clamp_min": clamp, "clamp_max": clamp,
        "isnan": lambda e, node: e.call("IsNaN", e.value(node.args[0])),
    }
)  # fmt: skip
"""ATen base name -> translation."""
