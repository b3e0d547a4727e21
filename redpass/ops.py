"""Traits of operations, declared once. Passes ask these; no pass keeps a list of op names.

An op nobody declared is opaque: not pure, so it is kept, never moved, merged or removed.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import sympy
import torch
from torch import fx

aten = torch.ops.aten

TRUSTED_NAMESPACES = frozenset({"aten", "redpass", "prims"})
"""Namespaces whose schemas are believed about purity; custom ops of others stay opaque."""

SIZE_FUNCTIONS: frozenset[Callable[..., Any]] = frozenset(
    {
        operator.add, operator.sub, operator.mul, operator.floordiv, operator.mod, operator.neg,
        operator.truediv, operator.eq, operator.ne, operator.lt, operator.le, operator.gt,
        operator.ge, operator.pow, operator.and_, operator.or_, math.ceil, math.floor, math.trunc,
        torch.sym_max, torch.sym_min, torch.sym_float, torch.sym_int, torch.sym_not,
        torch.sym_ite,
    }
)  # fmt: skip
"""Pure functions on symbolic sizes."""

VIEWS = frozenset(
    {
        "view", "reshape", "_unsafe_view", "transpose", "permute", "unsqueeze", "squeeze", "expand",
        "slice", "select", "t", "flatten", "unflatten", "narrow", "chunk", "split", "unbind",
        "split_with_sizes", "expand_as", "view_as", "reshape_as", "movedim", "swapaxes", "diagonal",
        "unfold", "numpy_T", "mT", "adjoint", "alias", "detach", "squeeze_", "tensor_split",
    }
)  # fmt: skip
"""ATen ops that move or rename elements and compute nothing."""

COPYING_VIEWS = frozenset({"reshape", "flatten"})
"""Views that copy when the elements do not lie in memory as the new shape needs."""

RESHAPES = frozenset({"view", "reshape", "_unsafe_view"})
"""Ops that give the elements, in order, a shape that is written out."""

SHAPE_ONLY = RESHAPES | {"flatten", "unflatten", "unsqueeze", "squeeze"}
"""Ops that keep the elements in order and change the shape alone."""

DROPOUTS = frozenset({"dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout"})
"""ATen ops that return their operand as it is when not in training mode."""

UNTAGGED = frozenset({"hardswish", "log_sigmoid"})
"""Elementwise ATen ops that PyTorch (2.11 to 2.13) does not tag as such."""

NEUTRAL = {"mul": 1, "div": 1, "add": 0, "sub": 0}
"""ATen op -> the right operand that changes nothing, up to the sign of zero (`add`, `sub`)."""

LINEARS = frozenset({"linear", "mm", "addmm", "matmul", "bmm", "conv1d", "conv2d", "conv3d"})
"""ATen ops that are linear in their first operand when the others are weights."""


COMMUTATIVE = frozenset(
    {
        "add", "mul", "eq", "ne", "logical_and", "logical_or", "logical_xor", "bitwise_and",
        "bitwise_or", "bitwise_xor", "__and__", "__or__", "__xor__", "and_", "or_",
    }
)  # fmt: skip
"""ATen ops and Python operators whose first two operands may change places, bit for bit.

Not `maximum` and `minimum`: which zero they return may depend on the order.
"""

CASTS = frozenset({"to", "_to_copy", "type_as", "float", "half", "bfloat16"})
"""ATen ops that change the dtype or layout of a tensor and nothing else."""

COPIES = frozenset({"clone", "contiguous", "lift_fresh", "lift_fresh_copy", "alias", "detach"})
"""ATen ops that return the elements of their operand in the same places."""

NO_OPS = CASTS | COPIES | SHAPE_ONLY | DROPOUTS
"""ATen ops that, outside training, return all elements of their operand in the same order."""

JOINS = frozenset({"cat", "concat", "concatenate"})
"""ATen ops that put tensors side by side along an axis they have, and compute nothing."""

FILLS = frozenset({"new_ones", "new_zeros", "new_full", "ones_like", "zeros_like", "full_like"})
"""ATen ops that take sizes and dtype from their first operand and never read its elements."""

ALIASES = {
    "multiply": "mul", "subtract": "sub", "divide": "div", "true_divide": "div", "concat": "cat",
    "concatenate": "cat", "swapaxes": "transpose.int", "swapdims": "transpose.int",
    "moveaxis": "movedim",
    "absolute": "abs", "negative": "neg", "clip": "clamp", "greater": "gt", "greater_equal": "ge",
    "less": "lt", "less_equal": "le", "not_equal": "ne", "arctan": "atan", "arctan2": "atan2",
    "det": "linalg_det", "inverse": "linalg_inv", "special_expit": "sigmoid", "special_erf": "erf",
    "special_softmax": "softmax.int", "special_log_softmax": "log_softmax.int",
}  # fmt: skip
"""ATen ops with two names -> the one that graphs hold."""

LOOKUPS = frozenset({"embedding"})
"""ATen ops that return rows of their first operand as they are."""

ANDS = frozenset({"logical_and", "bitwise_and", "__and__"})
"""ATen ops that, on booleans, return one operand when the other is true everywhere."""

ORS = frozenset({"logical_or", "bitwise_or", "__or__"})
"""ATen ops that, on booleans, return one operand when the other is false everywhere."""


def base_name(node: fx.Node) -> str:
    """Returns the op's name without namespace and overload (`linear`), or "" for a non-call."""
    if node.op != "call_function":
        return ""
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.name.split("::")[1]
    return getattr(node.target, "__name__", "")


def namespace(node: fx.Node) -> str:
    """Returns the op's namespace (`aten`, `redpass`), or "" when it is not a registered op."""
    target = node.target
    return target.namespace if isinstance(target, torch._ops.OpOverload) else ""


def is_call(node: fx.Node, *names: str) -> bool:
    """Whether `node` calls an ATen op with one of these base names, any overload."""
    return namespace(node) == "aten" and base_name(node) in names


def is_random(node: fx.Node) -> bool:
    """Whether two calls may give two results (dropout in training mode, `rand`)."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return False
    if is_call(node, "dropout", "native_dropout", "feature_dropout", "alpha_dropout"):
        return bool(argument(node, "train", "training") is not False and not _has_zero_rate(node))
    if is_call(node, "scaled_dot_product_attention"):
        return bool(argument(node, "dropout_p"))
    return torch.Tag.nondeterministic_seeded in target.tags


def is_pure(node: fx.Node) -> bool:
    """Whether the value depends on the arguments alone and computing it changes nothing.

    Weights are pure. Inputs and outputs are not: they are public. Unknown ops are not.
    """
    if node.op == "get_attr":
        return True
    if node.op != "call_function":
        return False
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        trusted = target.namespace in TRUSTED_NAMESPACES
        return (
            trusted and not target._schema.is_mutable and not is_check(node) and not is_random(node)
        )
    return target in SIZE_FUNCTIONS or target is operator.getitem


def is_elementwise(node: fx.Node) -> bool:
    """Whether each output element depends on the operands' elements at the same place only."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return False
    return torch.Tag.pointwise in target.tags or is_call(node, *UNTAGGED)


def read_nodes(node: fx.Node) -> list[fx.Node]:
    """Returns the operands whose values matter: all, but for a fill that reads sizes alone."""
    operands = node.all_input_nodes
    return [o for o in operands if o is not node.args[0]] if is_call(node, *FILLS) else operands


def is_commutative(node: fx.Node) -> bool:
    """Whether the first two operands may change places without changing a bit."""
    if base_name(node) not in COMMUTATIVE:
        return False
    if not isinstance(node.target, torch._ops.OpOverload):
        return True
    return namespace(node) == "aten" and bool(node.kwargs.get("alpha", 1) == 1)


def is_check(node: fx.Node) -> bool:
    """Whether the op only raises when a condition does not hold."""
    return base_name(node).startswith(("_assert", "sym_constrain", "_check"))


def is_proven_check(node: fx.Node) -> bool:
    """Whether the op checks what the fake values already say: dtype, sizes, strides, device."""
    if is_call(node, "_assert_scalar"):
        return node.args[0] is True
    if not is_call(node, "_assert_tensor_metadata") or not isinstance(node.args[0], fx.Node):
        return False
    value = node.args[0].meta["val"]
    dtype, sizes, strides = layout_of(value)
    found = {"dtype": dtype, "size": sizes, "stride": strides, "device": value.device}
    wanted = {name: argument(node, name) for name in found}
    return all(want is None or want == found[name] for name, want in wanted.items())


def is_view(node: fx.Node) -> bool:
    """Whether the op only moves or renames elements."""
    return namespace(node) == "aten" and base_name(node) in VIEWS


def is_size(node: fx.Node) -> bool:
    """Whether the node computes a symbolic size (an integer), not a tensor."""
    return isinstance(node.meta.get("val"), torch.SymInt | int) or is_call(node, "sym_size")


def is_float(node: fx.Node) -> bool:
    """Whether the node's value is a floating-point tensor."""
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def is_contiguous(node: fx.Node) -> bool:
    """Whether the node's value is a tensor whose elements lie in row-major order."""
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor):
        return False
    expected: Any = 1
    for size, stride in zip(reversed(value.shape), reversed(value.stride()), strict=True):
        is_free = isinstance(size, int) and size == 1
        if not is_free and sympy.expand(expression(stride) - expected) != 0:
            return False
        expected = expected * expression(size)
    return True


def layout(node: fx.Node) -> Any:
    """Returns dtype, sizes and strides of the node's value, as something to compare.

    Sizes are expressions over the symbols; comparing them adds no guards. A value that is no
    tensor has its type.
    """
    return layout_of(node.meta.get("val"))


def expression(size: int | torch.SymInt) -> Any:
    """Returns a size as something to compare: a number, or an expression over the symbols."""
    return size.node.expr if isinstance(size, torch.SymInt) else size


def layout_of(value: Any) -> Any:
    """Returns what `layout` does, for a fake value or several."""
    if isinstance(value, torch.Tensor):
        sizes = [list(map(expression, numbers)) for numbers in (value.shape, value.stride())]
        return value.dtype, *sizes
    return [layout_of(v) for v in value] if isinstance(value, list | tuple) else type(value)


def argument(node: fx.Node, *names: str) -> Any:
    """Returns the value of the argument called one of `names`, its schema default if omitted.

    Raises:
        KeyError: the op has no argument of these names.
    """
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        raise KeyError(names[0])
    for position, parameter in enumerate(target._schema.arguments):
        if parameter.name in names:
            if position < len(node.args) and not parameter.kwarg_only:
                return node.args[position]
            return node.kwargs.get(parameter.name, parameter.default_value)
    raise KeyError(names[0])


def _has_zero_rate(node: fx.Node) -> bool:
    return bool(argument(node, "p") == 0)


def one_name(target: Any) -> Any:
    """Returns the overload under the name that graphs hold, for ATen ops that have two."""
    if not isinstance(target, torch._ops.OpOverload) or target.namespace != "aten":
        return target
    name = target._schema.name.removeprefix("aten::")
    packet, _, overload = ALIASES.get(name, name).partition(".")
    return getattr(getattr(aten, packet), overload or target._overloadname, target)
