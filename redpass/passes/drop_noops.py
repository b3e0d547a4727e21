"""Drops ops that return their operand.

a = dropout(x, 0.1, False)
b = view(a, [n, 8])             (x is [n, 8] already)    ->    y = relu(x)
y = relu(b)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode

from redpass import ops
from redpass.facts import Facts
from redpass.fake import fake_mode
from redpass.plan import Action, Erase, Exactness, Plan, Replace, Skip
from redpass.program import Program

CHECK = "drop_noops.check"
Found = fx.Node | str | None
"""The value that stands for a node, why none does, or None: the rule is not about the node."""


@dataclass(frozen=True)
class DropNoops:
    """Lets readers of a value read the equal value it was made from.

    What: views (and chains of views, such as a transpose and its inverse) that end in the shape
    and strides they began with; casts to the dtype a value has; copies; dropout outside training;
    checks that tracing has proven.
    When: dtype, shape and strides are those of the operand, so no reader sees a difference. A copy
    that changes the layout goes only when all its readers are themselves moves that give the same
    result without it: arithmetic over another layout may round differently.
    Not tried: arithmetic that changes nothing (`drop_neutral_operands`).
    Costs: one walk; fake kernels of the readers of copies.
    """

    name: ClassVar[str] = "drop_noops"
    needs: ClassVar[tuple[Any, ...]] = ()
    exactness: ClassVar[Exactness] = Exactness.SAME_BITS

    def plan(self, program: Program, facts: Facts) -> Plan:
        """Plans one action per op that returns its operand."""
        noops = _Noops(fake_mode(program))
        return Plan.of(item for node in program.graph.nodes for item in noops.judge(node))


@dataclass
class _Noops:
    """One walk in graph order.

    Attributes:
        same: op found to do nothing -> the value that stands for it.
    """

    mode: FakeTensorMode
    same: dict[fx.Node, fx.Node] = field(default_factory=dict)

    def judge(self, node: fx.Node) -> Iterator[Action | Skip]:
        if ops.is_check(node):
            yield _judge_check(node)
        if not node.users or not isinstance(node.meta.get("val"), Tensor):
            return
        for rule, reason, find in (
            ("drop_noops.view", "the same elements in the same places as", self._view),
            ("drop_noops.cast", "it already has the dtype of", self._cast),
            ("drop_noops.copy", "no reader can tell it from", self._copy),
            ("drop_noops.dropout", "outside training it returns", self._dropout),
        ):
            found = find(node)
            if isinstance(found, str):
                yield Skip(rule, node.name, found)
            elif found is not None:
                self.same[node] = found
                edits = (Replace(node.name, found.name),)
                yield Action(rule, node.name, edits, f"{reason} {found.name}")
                return

    def _operand(self, node: fx.Node) -> fx.Node:
        first = node.all_input_nodes[0]
        return self.same.get(first, first)

    def _view(self, node: fx.Node) -> Found:
        """Follows views back to one of this layout: in one memory, that makes them equal."""
        wanted, source = ops.layout(node), node
        while ops.is_view(source) and not wanted[0].is_complex:
            before = self._operand(source)
            copies = ops.is_call(source, *ops.COPYING_VIEWS) and not ops.is_contiguous(before)
            if copies and ops.layout(before) != ops.layout(source):
                return None
            if ops.is_call(source, "squeeze") and _rank(before) == _rank(source):
                return None  # tracing took the size not to be 1; when it is, the rank changes
            source = before
            if ops.layout(source) == wanted:
                return source
        return None

    def _cast(self, node: fx.Node) -> Found:
        if not ops.is_call(node, *ops.CASTS):
            return None
        source = self._operand(node)
        stays = node.meta["val"].device == source.meta["val"].device
        return source if stays and ops.layout(source) == ops.layout(node) else None

    def _copy(self, node: fx.Node) -> Found:
        if not ops.is_call(node, *ops.COPIES):
            return None
        source = self._operand(node)
        return self._why_not_without(node, source) or source

    def _dropout(self, node: fx.Node) -> Found:
        if not ops.is_call(node, *ops.DROPOUTS):
            return None
        return self._why_not_dropped(node) or self._operand(node)

    def _why_not_dropped(self, dropout: fx.Node) -> str | None:
        return "it is in training mode" if ops.is_random(dropout) else None

    def _why_not_without(self, copy: fx.Node, source: fx.Node) -> str | None:
        if source.op != "call_function" and any(user.op == "output" for user in copy.users):
            return "it keeps an output apart from an input or a weight"
        if ops.layout(copy) == ops.layout(source):
            return None
        for reader in copy.users:
            moves = ops.is_call(reader, *ops.COPYING_VIEWS, *ops.JOINS)
            if not moves or self._layout_without(reader, copy, source) != ops.layout(reader):
                return f"{reader.name} depends on the order in memory that this gives"
        return None

    def _layout_without(self, reader: fx.Node, copy: fx.Node, source: fx.Node) -> Any:
        args, kwargs = fx.node.map_arg(
            (reader.args, reader.kwargs), lambda n: (source if n is copy else n).meta["val"]
        )
        with self.mode:
            return ops.layout_of(reader.target(*args, **kwargs))  # type: ignore[operator]


def _rank(node: fx.Node) -> int:
    return int(node.meta["val"].dim())


def _judge_check(node: fx.Node) -> Action | Skip:
    if ops.is_proven_check(node):
        return Action(CHECK, node.name, (Erase(node.name),), "tracing has proven what it checks")
    return Skip(CHECK, node.name, "what it checks may depend on the input")
