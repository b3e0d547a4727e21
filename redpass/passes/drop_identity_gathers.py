"""Turns gathers that pick every element in order into views.

    rows = arange(n); columns = arange(m)                     (mask is [n, m])
    y = index(mask, [rows[:, None], columns[None, :]])   ->   y = view(mask, [n, m])

This is how masks that were written element by element (`vmap`) come out of tracing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from redpass import ops
from redpass.facts import Facts
from redpass.plan import Action, Edit, Exactness, Insert, Plan, Ref, Replace, Skip
from redpass.program import Program

RULE = "drop_identity_gathers.whole_axes"


@dataclass(frozen=True)
class DropIdentityGathers:
    """Replaces a gather whose indices count through each axis by a view.

    What: `index` on every axis, each index an `arange` over the whole axis that lies along an axis
    of its own in the result. The elements come out as they went in, with axes of size 1 between.
    When: the axes keep their order and the operand's elements lie in row-major order, so that the
    view has the layout of the gather's result.
    Not tried: axes that change places, parts of an axis, gathers on some axes only.
    Costs: one walk over the graph.
    """

    name: ClassVar[str] = "drop_identity_gathers"
    needs: ClassVar[tuple[Any, ...]] = ()
    exactness: ClassVar[Exactness] = Exactness.SAME_BITS

    def plan(self, program: Program, facts: Facts) -> Plan:
        """Plans one action per gather that changes nothing but the shape."""
        return Plan.of(item for node in program.graph.nodes for item in _judge(node))


def _judge(node: fx.Node) -> Iterator[Action | Skip]:
    if not ops.is_call(node, "index") or not node.users:
        return
    source, indices = node.args
    if not isinstance(source, fx.Node) or not isinstance(indices, list | tuple):
        return
    counters = [_counter(index) for index in indices]
    if None in counters:
        return
    if reason := _why_not(node, source, indices):
        yield Skip(RULE, node.name, reason)
    else:
        yield _to_view(node, source, indices)


def _why_not(node: fx.Node, source: fx.Node, indices: Any) -> str | None:
    sizes = source.meta["val"].shape
    if len(indices) != len(sizes):
        return "it gathers along some axes only"
    counted = [index.meta["val"].numel() for index in indices]
    if list(map(ops.expression, counted)) != list(map(ops.expression, sizes)):
        return "an index does not count through its whole axis"
    axes = [_axis(node, index) for index in indices]
    if axes != sorted(set(axes)):
        return "the axes change places"
    if not ops.is_contiguous(source):
        return "the elements do not lie in row-major order"
    return None


def _to_view(node: fx.Node, source: fx.Node, indices: Any) -> Action:
    taken = {_axis(node, index) for index in indices}
    edits: list[Edit] = []
    name = source.name
    for axis in range(node.meta["val"].dim()):
        if axis not in taken:
            args = (Ref(name), axis)
            name = f"{node.name}_axis_{axis}"
            edits.append(Insert(name, torch.ops.aten.unsqueeze.default, args, node.name))
    edits.append(Replace(node.name, name))
    reason = f"its indices count through all of {source.name}"
    return Action(RULE, node.name, tuple(edits), reason)


def _counter(index: Any) -> fx.Node | None:
    """Returns the `arange` from 0 in steps of 1 that `index` shows in one axis, if it does."""
    node = index
    while isinstance(node, fx.Node) and ops.is_call(node, *ops.SHAPE_ONLY):
        node = node.all_input_nodes[0]
    if not isinstance(node, fx.Node) or not ops.is_call(node, "arange"):
        return None
    start, step = (_option(node, name, default) for name, default in (("start", 0), ("step", 1)))
    sizes = [size for size in index.meta["val"].shape if not _is_one(size)]
    return node if (start, step) == (0, 1) and len(sizes) == 1 else None


def _option(node: fx.Node, name: str, default: int) -> Any:
    try:
        return ops.argument(node, name)
    except KeyError:
        return default


def _axis(node: fx.Node, index: fx.Node) -> int:
    """Returns the axis of the result along which `index` counts."""
    value: Tensor = index.meta["val"]
    behind = next(i for i, size in enumerate(reversed(value.shape)) if not _is_one(size))
    return int(node.meta["val"].dim()) - 1 - behind


def _is_one(size: int | torch.SymInt) -> bool:
    return isinstance(size, int) and size == 1
