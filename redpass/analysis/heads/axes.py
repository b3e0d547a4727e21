"""Axes as products of sizes that stay and sizes that become others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import sympy
from torch import fx

from redpass import ops
from redpass.plan import Ref
from redpass.program import Program


class Unfit(Exception):  # noqa: N818
    """Why the heads of an attention cannot be cut."""


@dataclass(frozen=True)
class Factor:
    """A size that becomes another one: of an axis, or one of several that an axis is made of."""

    name: str
    old: int
    new: int


Axis = tuple[Any, ...]
"""Entries in order: integers, expressions, factors. An empty one is a size of 1."""

Form = tuple[Axis, ...]


def plain_form(node: fx.Node) -> Form:
    """Returns the form of a value that stays as it is."""
    return tuple((ops.expression(size),) for size in node.meta["val"].shape)


def is_touched(axis: Axis) -> bool:
    """Whether a size in it changes."""
    return any(isinstance(entry, Factor) for entry in axis)


def old_size(axis: Axis) -> Any:
    """Returns the size of an axis before the change."""
    return sympy.sympify(sympy.prod([e.old if isinstance(e, Factor) else e for e in axis]))


def new_size(axis: Axis) -> Any:
    """Returns the size of an axis after the change."""
    return sympy.sympify(sympy.prod([e.new if isinstance(e, Factor) else e for e in axis]))


def is_equal(left: Any, right: Any) -> bool:
    """Whether two sizes are the same number or expression."""
    return bool(sympy.expand(left - right) == 0)


def take(entries: list[Any], size: Any, node: fx.Node) -> Axis:
    """Takes entries off the front of a list until their product is `size`.

    Raises:
        Unfit: an axis would hold a piece of a factor.
    """
    taken: list[Any] = []
    while not is_equal(old_size(tuple(taken)), size):
        if not entries:
            raise Unfit(f"{node.name} parts heads in a way that was not followed")
        rest = _parted(entries, size, old_size(tuple(taken)))
        taken.append(entries.pop(0))
        entries[:0] = rest
    return tuple(taken)


def _parted(entries: list[Any], size: Any, taken: Any) -> list[Any]:
    """Parts the first entry in two when an axis takes a piece of it; returns the second one."""
    wanted = sympy.simplify(size / taken)
    first = entries[0]
    if isinstance(first, Factor) or is_equal(first, wanted):
        return []
    rest = sympy.simplify(first / wanted)
    if not rest.is_Integer and not (rest.is_polynomial() and not rest.is_Number):
        return []
    entries[0] = wanted
    return [rest]


def named(arguments: Any) -> Any:
    """Returns arguments with names in place of nodes, as edits hold them."""
    by_name: Any = lambda node: Ref(node.name)  # noqa: E731
    return fx.node.map_arg(arguments, by_name)


def new_node(program: Program, name: str) -> str:
    """Returns a name that no node of the program has: edits find nodes by name."""
    found, number = name, 2
    while found in program.nodes:
        found, number = f"{name}_{number}", number + 1
    return found
