"""Sizes by name: what a port's `past + seq` is for given sizes, and whether a graph agrees."""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import sympy
import torch
from torch import Tensor
from torch.utils._sympy.functions import FloorDiv

from redpass.errors import VerifyError
from redpass.program import Shape

_BINARY: Mapping[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: FloorDiv,
    ast.Div: operator.truediv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}
_CALLS: Mapping[str, Callable[..., Any]] = {
    "Max": sympy.Max, "Min": sympy.Min, "Mod": operator.mod, "FloorDiv": FloorDiv,
    "CleanDiv": FloorDiv, "floor": sympy.floor, "ceiling": sympy.ceiling,
}  # fmt: skip


@lru_cache(maxsize=4096)
def parse_size(text: str) -> sympy.Expr:
    """Reads an expression over dimension names; names become positive integer symbols.

    Only arithmetic is understood: the text may come from a file, so nothing is evaluated.

    Raises:
        VerifyError: anything but numbers, names, arithmetic and min, max, floor, ceiling.
    """
    try:
        return sympy.sympify(_expression(ast.parse(text, mode="eval").body))
    except (SyntaxError, KeyError, AttributeError, TypeError) as error:
        hint = "expected arithmetic over dimension names, such as 'past + seq'"
        raise VerifyError(f"'{text}' is not a size", hint=hint) from error


def _expression(tree: ast.expr) -> Any:
    if isinstance(tree, ast.Constant) and isinstance(tree.value, int):
        return sympy.Integer(tree.value)
    if isinstance(tree, ast.Name):
        return symbol(tree.id)
    if isinstance(tree, ast.BinOp):
        return _BINARY[type(tree.op)](_expression(tree.left), _expression(tree.right))
    if isinstance(tree, ast.UnaryOp) and isinstance(tree.op, ast.USub):
        return -_expression(tree.operand)
    if isinstance(tree, ast.Call) and isinstance(tree.func, ast.Name):
        return _CALLS[tree.func.id](*map(_expression, tree.args))
    raise KeyError(type(tree).__name__)


@lru_cache(maxsize=4096)
def symbol(name: str) -> sympy.Symbol:
    """Returns the symbol that stands for the dimension called `name`."""
    return sympy.Symbol(name, integer=True, nonnegative=True)


def concrete(shape: Shape, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """Returns `shape` with its dimension names replaced by `sizes`.

    Raises:
        VerifyError: a dimension that `sizes` does not give.
    """
    values = {symbol(name): size for name, size in sizes.items()}
    found = []
    for size in shape:
        value = parse_size(size).subs(values) if isinstance(size, str) else size
        if isinstance(value, sympy.Expr) and value.free_symbols:
            raise VerifyError(f"no size is known for '{value}'", hint=f"known: {dict(sizes)}")
        found.append(int(value))
    return tuple(found)


@dataclass
class Names:
    """What each symbol of a graph is called, learnt from the input ports."""

    known: dict[sympy.Symbol, sympy.Expr] = field(default_factory=dict)

    def learn(self, want: int | str, size: int | torch.SymInt) -> None:
        """Takes over the port's name for a size that is one symbol with no name yet."""
        expression = size_expression(size)
        if isinstance(want, str) and isinstance(expression, sympy.Symbol):
            self.known.setdefault(expression, parse_size(want))

    def agree(self, want: int | str, size: int | torch.SymInt) -> bool:
        """Whether the size in the graph is what the port says, by names or by symbols.

        A size over symbols that no input port names is believed: only the trace knows it.
        """
        expression = size_expression(size)
        if str(expression) == str(want):
            return True
        expected = parse_size(want) if isinstance(want, str) else sympy.Integer(want)
        if any(item not in self.known for item in expression.free_symbols):
            return isinstance(want, str)
        return _equal(_substitute(expression, self.known), expected)

    def show(self, size: int | torch.SymInt) -> str:
        """Returns a size in the words of the ports."""
        return str(_substitute(size_expression(size), self.known))

    def same(self, left: Any, right: Any) -> bool:
        """Whether two fake values have one dtype and shape; data-dependent sizes are believed."""
        if isinstance(left, tuple | list) and isinstance(right, tuple | list):
            return len(left) == len(right) and all(map(self.same, left, right))
        if isinstance(left, Tensor) and isinstance(right, Tensor):
            alike = left.dtype == right.dtype and left.dim() == right.dim()
            return alike and all(map(self.same, left.shape, right.shape))
        if isinstance(left, int | torch.SymInt) and isinstance(right, int | torch.SymInt):
            return _equal(size_expression(left), size_expression(right))
        return type(left) is type(right)


def size_expression(size: int | torch.SymInt) -> sympy.Expr:
    """Returns a size as an expression over the graph's symbols."""
    return size.node.expr if isinstance(size, torch.SymInt) else sympy.Integer(int(size))


def _substitute(expression: sympy.Expr, known: Mapping[sympy.Symbol, sympy.Expr]) -> sympy.Expr:
    used = {item: known[item] for item in expression.free_symbols if item in known}
    return expression.xreplace(used) if used else expression


@lru_cache(maxsize=65536)
def _equal(left: sympy.Expr, right: sympy.Expr) -> bool:
    """Whether two expressions agree at points far apart: what simplifying proves, in less time."""
    if left == right:
        return True
    symbols = sorted(left.free_symbols | right.free_symbols, key=str)
    if any(_DATA_DEPENDENT.fullmatch(str(item)) for item in symbols):
        return True
    for start in _POINTS:
        values = {item: start * (at + 2) + at for at, item in enumerate(symbols)}
        if left.subs(values) != right.subs(values):
            return False
    return True


_POINTS = (7, 64, 1021)
_DATA_DEPENDENT = re.compile(r"u\d+")


def describe(value: Any) -> str:
    """Returns a fake value's dtype and shape in words."""
    if isinstance(value, Tensor):
        dims = ", ".join(str(size) for size in value.shape)
        return f"{str(value.dtype).removeprefix('torch.')}[{dims}]"
    if isinstance(value, tuple | list):
        return f"({', '.join(map(describe, value))})"
    return f"{type(value).__name__} {value}"
