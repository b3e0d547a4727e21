"""Prints pointwise FX nodes as Triton expressions: the tail of a hot path becomes its epilogue.

    %mul = mul(%x, 0.5)          mul = (x * 0.5)
    %gelu = silu(%mul)     ->    silu = (mul / (1.0 + tl.exp(-mul)))
    %add = add(%gelu, %r)        add = (silu + r)

Arithmetic is float32 throughout, as PyTorch computes inside each op; a cast that stands in the
graph rounds where it stands. Comparisons and `where` keep NaN where PyTorch does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from redpass import ops

TYPES: Mapping[torch.dtype, str] = {
    torch.float32: "tl.float32",
    torch.float16: "tl.float16",
    torch.bfloat16: "tl.bfloat16",
}
"""The element types kernels compute on, and their names in Triton."""

TANH = '''@triton.jit
def precise_tanh(x):
    """Hyperbolic tangent to float32 rounding: a series near 0, where the quotient cancels."""
    square = x * x
    series = -0.333333333 + square * (0.133333333 + square * (-0.053968254 + square * 0.021869489))
    falling = tl.exp(-2.0 * tl.abs(x))
    far = (1.0 - falling) / (1.0 + falling)
    return tl.where(tl.abs(x) < 0.25, x + x * square * series, tl.where(x < 0.0, -far, far))'''
"""Triton has no tanh of its own, and the CUDA library's does not run in the interpreter."""

HELPERS: Mapping[str, str] = {"precise_tanh": TANH}
"""Functions that printed expressions may call, by name."""

MOST_FACTORS = 8
"""A power up to this whole number is written as products."""


class UnprintableError(Exception):
    """A node has no Triton form; the message is the reason in words."""


@dataclass(frozen=True)
class Printed:
    """A printed chain of nodes.

    Attributes:
        lines: assignments, one a node, in graph order.
        result: the name (or number) that holds the last node's value, float32.
        helpers: names in `HELPERS` that the lines call.
    """

    lines: tuple[str, ...]
    result: str
    helpers: frozenset[str]

    @property
    def sources(self) -> tuple[str, ...]:
        """Source text of the helpers, in order of name."""
        return tuple(HELPERS[name] for name in sorted(self.helpers))


def print_expression(
    nodes: Iterable[fx.Node],
    leaves: Mapping[fx.Node, str],
    names: Mapping[fx.Node, str] | None = None,
) -> Printed:
    """Prints `nodes`, in graph order, the last one being the result.

    Args:
        leaves: nodes computed elsewhere -> the name that holds their value, as float32 (or as a
            truth value for conditions).
        names: what the printed nodes are called; their own names by default.

    Raises:
        UnprintableError: a node or an operand that has no Triton form; says which and why.
    """
    state = _State(dict(leaves), names or {})
    result = ""
    for node in nodes:
        result = state.add(node)
    if not result:
        raise UnprintableError("there is nothing to print")
    return Printed(tuple(state.lines), result, frozenset(state.helpers))


def why_not(node: fx.Node) -> str:
    """Returns why `node` cannot be printed, "" when it can, given operands that can."""
    try:
        leaves = {operand: operand.name for operand in node.all_input_nodes}
        print_expression([node], leaves)
    except UnprintableError as reason:
        return str(reason)
    return ""


@dataclass
class _State:
    names: dict[fx.Node, str]
    wanted: Mapping[fx.Node, str]
    lines: list[str] = field(default_factory=list)
    helpers: set[str] = field(default_factory=set)

    def add(self, node: fx.Node) -> str:
        text = self._text(node)
        if not text.isidentifier():
            name = self.wanted.get(node, node.name)
            self.lines.append(f"{name} = {text}")
            text = name
        self.names[node] = text
        return text

    def operand(self, value: Any) -> str:
        if isinstance(value, fx.Node):
            if value not in self.names:
                raise UnprintableError(f"'{value.name}' is not among the operands")
            return self.names[value]
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise UnprintableError(f"an operand of type {type(value).__name__}")
        return _number(value)

    def _text(self, node: fx.Node) -> str:
        _check_types(node)
        name = ops.base_name(node)
        if ops.namespace(node) != "aten" or name not in TABLE:
            raise UnprintableError(f"'{name or node.op}' has no Triton form")
        text = TABLE[name](self, node)
        self.helpers |= {helper for helper in HELPERS if f"{helper}(" in text}
        return text


Form = Callable[[_State, fx.Node], str]


def _check_types(node: fx.Node) -> None:
    for item in (node, *node.all_input_nodes):
        value = item.meta.get("val")
        if not isinstance(value, torch.Tensor):
            raise UnprintableError(f"'{item.name}' is a size, not a tensor")
        if value.dtype not in TYPES and value.dtype is not torch.bool:
            dtype = str(value.dtype).removeprefix("torch.")
            raise UnprintableError(f"'{item.name}' is {dtype}")


def _number(value: float) -> str:
    if math.isinf(value) or math.isnan(value):
        return f'float("{value}")'
    text = repr(float(value))
    return f"({text})" if value < 0 else text


def _filled(template: str) -> Form:
    """A form whose template names the first operand `{x}` and the second `{y}`."""

    def form(state: _State, node: fx.Node) -> str:
        names = [state.operand(item) for item in node.args[: 2 if "{y}" in template else 1]]
        return template.format(x=names[0], y=names[-1])

    return form


def _scaled(template: str) -> Form:
    """A sum or difference, whose second operand `alpha` multiplies."""

    def form(state: _State, node: fx.Node) -> str:
        x, y = (state.operand(item) for item in node.args[:2])
        alpha = ops.argument(node, "alpha")
        y = y if alpha == 1 else f"({state.operand(alpha)} * {y})"
        return template.format(x=x, y=y)

    return form


def _divided(state: _State, node: fx.Node) -> str:
    if node.kwargs.get("rounding_mode") is not None:
        raise UnprintableError("a division that rounds")
    x, y = (state.operand(item) for item in node.args[:2])
    return f"({x} / {y})"


def _gelu(state: _State, node: fx.Node) -> str:
    x = state.operand(node.args[0])
    if ops.argument(node, "approximate") == "tanh":
        return (
            f"(0.5 * {x} * (1.0 + precise_tanh(0.7978845608 * ({x} + 0.044715 * {x} * {x} * {x}))))"
        )
    return f"(0.5 * {x} * (1.0 + tl.erf(0.7071067812 * {x})))"


def _power(state: _State, node: fx.Node) -> str:
    x, exponent = state.operand(node.args[0]), node.args[1]
    roots = {0.5: f"tl.sqrt({x})", -0.5: f"(1.0 / tl.sqrt({x}))", -1: f"(1.0 / {x})"}
    if isinstance(exponent, int | float) and exponent in roots:
        return roots[exponent]
    if not isinstance(exponent, int | float) or exponent not in range(1, MOST_FACTORS + 1):
        raise UnprintableError(f"a power of {exponent}")
    return "(" + " * ".join([x] * int(exponent)) + ")"


def _clamped(state: _State, node: fx.Node) -> str:
    x, name = state.operand(node.args[0]), ops.base_name(node)
    low = ops.argument(node, "min") if name in ("clamp", "clamp_min") else None
    high = ops.argument(node, "max") if name in ("clamp", "clamp_max") else None
    if low is not None:
        limit = state.operand(low)
        x = f"tl.where({x} < {limit}, {limit}, {x})"
    if high is not None:
        limit = state.operand(high)
        x = f"tl.where({x} > {limit}, {limit}, {x})"
    return x


def _chosen(state: _State, node: fx.Node) -> str:
    condition, x, y = (state.operand(item) for item in node.args[:3])
    return f"tl.where({condition}, {x}, {y})"


def _leaky(state: _State, node: fx.Node) -> str:
    x, slope = state.operand(node.args[0]), state.operand(ops.argument(node, "negative_slope"))
    return f"tl.where({x} < 0.0, {slope} * {x}, {x})"


def _cast(state: _State, node: fx.Node) -> str:
    """Rounds to a narrower type; a wider one changes nothing, since all is float32."""
    source: Any = node.args[0]
    x, old, new = state.operand(source), source.meta["val"].dtype, node.meta["val"].dtype
    if torch.bool in (old, new):
        if new is old:
            return x
        raise UnprintableError("a cast between truth values and numbers")
    if new in (old, torch.float32):
        return x
    return f"{x}.to({TYPES[new]}).to(tl.float32)"


def _same(state: _State, node: fx.Node) -> str:
    if ops.is_random(node):
        raise UnprintableError("dropout in training mode")
    return state.operand(node.args[0])


TABLE: Mapping[str, Form] = {
    "add": _scaled("({x} + {y})"),
    "sub": _scaled("({x} - {y})"),
    "rsub": _scaled("({y} - {x})"),
    "mul": _filled("({x} * {y})"),
    "div": _divided,
    "true_divide": _divided,
    "neg": _filled("(-{x})"),
    "abs": _filled("tl.abs({x})"),
    "exp": _filled("tl.exp({x})"),
    "log": _filled("tl.log({x})"),
    "sin": _filled("tl.sin({x})"),
    "cos": _filled("tl.cos({x})"),
    "erf": _filled("tl.erf({x})"),
    "sqrt": _filled("tl.sqrt({x})"),
    "rsqrt": _filled("(1.0 / tl.sqrt({x}))"),
    "reciprocal": _filled("(1.0 / {x})"),
    "square": _filled("({x} * {x})"),
    "sigmoid": _filled("(1.0 / (1.0 + tl.exp(-{x})))"),
    "silu": _filled("({x} / (1.0 + tl.exp(-{x})))"),
    "tanh": _filled("precise_tanh({x})"),
    "relu": _filled("tl.where({x} < 0.0, 0.0, {x})"),
    "gelu": _gelu,
    "leaky_relu": _leaky,
    "pow": _power,
    "clamp": _clamped,
    "clamp_min": _clamped,
    "clamp_max": _clamped,
    "maximum": _filled("tl.where(({x} > {y}) | ({x} != {x}), {x}, {y})"),
    "minimum": _filled("tl.where(({x} < {y}) | ({x} != {x}), {x}, {y})"),
    "where": _chosen,
    "eq": _filled("({x} == {y})"),
    "ne": _filled("({x} != {y})"),
    "lt": _filled("({x} < {y})"),
    "le": _filled("({x} <= {y})"),
    "gt": _filled("({x} > {y})"),
    "ge": _filled("({x} >= {y})"),
    "logical_and": _filled("({x} & {y})"),
    "logical_or": _filled("({x} | {y})"),
    "logical_not": _filled("(~{x})"),
    **dict.fromkeys(("to", "_to_copy"), _cast),
    **dict.fromkeys(("clone", "contiguous", "alias", "detach", *ops.DROPOUTS), _same),
}
"""ATen base name -> the form it is printed in."""
