"""Drops arithmetic that changes nothing.

    a = mul(x, 1.0)
    b = cat([empty, a])       (empty has no elements)    ->    y = relu(x)
    c = masked_fill(b, none, -inf)
    y = relu(c)

Not arithmetic but moves and casts are the business of `drop_noops`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from redpass import ops
from redpass.facts import Facts
from redpass.plan import Action, Exactness, Insert, Plan, Ref, Replace, Skip
from redpass.program import Program

NUMBER, PART, MASK = (
    "drop_neutral_operands.number",
    "drop_neutral_operands.empty_part",
    "drop_neutral_operands.mask",
)


@dataclass(frozen=True)
class DropNeutralOperands:
    """Lets readers of an operation with a neutral operand read the other operand.

    What: multiplying or dividing by 1, adding or subtracting 0, joining with tensors that have no
    elements, selecting by masks that are all true or all false.
    When: literals, weights of one element and boolean weights say so, and the result has dtype,
    shape and strides of the other operand. Adding 0.0 to floats stays: it turns -0.0 into 0.0;
    subtracting 0.0 does not.
    Not tried: larger weights that happen to hold ones or zeros.
    Costs: one walk; boolean weights are read once.
    """

    name: ClassVar[str] = "drop_neutral_operands"
    needs: ClassVar[tuple[Any, ...]] = ()
    exactness: ClassVar[Exactness] = Exactness.SAME_BITS

    def plan(self, program: Program, facts: Facts) -> Plan:
        """Plans one action per operation that changes nothing."""
        neutral = _Neutral(program)
        return Plan.of(item for node in program.graph.nodes for item in neutral.judge(node))


@dataclass
class _Neutral:
    program: Program
    same: dict[fx.Node, fx.Node] = field(default_factory=dict)
    masks: dict[str, bool | None] = field(default_factory=dict)

    def judge(self, node: fx.Node) -> Iterator[Action | Skip]:
        if not node.users or not isinstance(node.meta.get("val"), Tensor):
            return
        if ops.is_call(node, *ops.NEUTRAL):
            yield from self._number(node)
        elif ops.is_call(node, *ops.JOINS) and isinstance(node.args[0], list | tuple):
            yield from self._parts(node, list(node.args[0]))  # type: ignore[arg-type]
        else:
            chosen = self._chosen(node)
            yield from self._replace(MASK, node, chosen, "its mask is the same everywhere")

    def _replace(self, rule: str, node: fx.Node, by: Any, reason: str) -> Iterator[Action]:
        if isinstance(by, fx.Node) and ops.layout(by) == ops.layout(node):
            self.same[node] = self.same.get(by, by)
            edit = Replace(node.name, self.same[node].name)
            yield Action(rule, node.name, (edit,), reason)

    def _number(self, node: fx.Node) -> Iterator[Action | Skip]:
        name = ops.base_name(node)
        exact = node.kwargs.get("alpha", 1) == 1 and node.kwargs.get("rounding_mode") is None
        for value, other in _sides(node):
            number = self._as_number(other)
            if not exact or isinstance(number, bool) or number != ops.NEUTRAL[name]:
                continue
            if name in ("add", "sub") and ops.is_float(node) and _changes_zero(name, number):
                yield Skip(NUMBER, node.name, "adding 0.0 turns -0.0 into 0.0")
                continue
            yield from self._replace(NUMBER, node, value, f"{name} with {number} changes nothing")
            return

    def _as_number(self, value: Any) -> Any:
        weight = self.program.weight(value) if isinstance(value, fx.Node) else None
        if weight is not None and weight.numel() == 1 and not weight.is_meta:
            return weight.item()
        return None if isinstance(value, fx.Node) else value

    def _parts(self, node: fx.Node, parts: list[fx.Node]) -> Iterator[Action]:
        rest = [part for part in parts if 0 not in part.meta["val"].shape]
        dtypes = {part.meta["val"].dtype for part in rest}
        gone = len(parts) - len(rest)
        if dtypes != {node.meta["val"].dtype}:
            return
        if len(rest) == 1:
            yield from self._replace(PART, node, rest[0], "only one part has elements")
        elif gone:
            name, refs = f"{node.name}_rest", [Ref(part.name) for part in rest]
            insert = Insert(name, node.target, (refs, *node.args[1:]), node.name, node.kwargs)  # type: ignore[arg-type]
            edits = (insert, Replace(node.name, name))
            yield Action(PART, node.name, edits, f"{gone} of {len(parts)} parts have no elements")

    def _chosen(self, node: fx.Node) -> Any:
        """Returns what the op gives for masks that are the same everywhere, else None."""
        if ops.is_call(node, "masked_fill"):
            return node.args[0] if self._as_mask(node.args[1]) is False else None
        if ops.is_call(node, "where") and len(node.args) == 3:
            mask = self._as_mask(node.args[0])
            return None if mask is None else node.args[1 if mask else 2]
        if ops.is_call(node, *ops.ANDS, *ops.ORS):
            neutral = ops.is_call(node, *ops.ANDS)
            return next((v for v, m in _sides(node) if self._as_mask(m) is neutral), None)
        return None

    def _as_mask(self, value: Any) -> bool | None:
        weight = self.program.weight(value) if isinstance(value, fx.Node) else None
        if weight is None or weight.dtype != torch.bool or weight.is_meta or not weight.numel():
            return None
        name = str(value.target)
        if name not in self.masks:
            self.masks[name] = True if bool(weight.all()) else (None if weight.any() else False)
        return self.masks[name]


def _sides(node: fx.Node) -> list[tuple[Any, Any]]:
    left, right = node.args[:2]
    return [(left, right), (right, left)] if ops.is_commutative(node) else [(left, right)]


def _changes_zero(name: str, number: float) -> bool:
    """Whether `-0.0 + number` or `-0.0 - number` is 0.0."""
    return (math.copysign(1.0, number) > 0) == (name == "add")
