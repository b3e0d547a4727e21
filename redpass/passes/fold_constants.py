"""Computes ahead what depends on weights and literals alone.

f = mul(freq, 2.0)        (freq is a weight)
y = mul(x, f)             ->    y = mul(x, freq_folded)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from redpass import ops
from redpass.analysis.constants import evaluate
from redpass.facts import Facts
from redpass.plan import Action, Exactness, Plan, Replace, SetWeight, Skip, WeightRef
from redpass.program import Program

RULE = "fold_constants.computed_ahead"


@dataclass(frozen=True)
class FoldConstants:
    """Replaces values that are the same for every input by weights.

    What: pure ops of fixed size whose inputs are weights, literals, or such values.
    When: the result is small, or no larger than the weights (or folded values) that only it read:
    then nothing grows. Values keep dtype and strides, so no bit of their readers changes.
    Not tried: views of weights that others read too, or views that repeat elements: they cost
    nothing as they are, and a second copy would (the transpose of a tied embedding). Values that
    are returned stay computed: callers own outputs. Weights that are fake.
    Costs: one run of the constant part of the graph, on the CPU.

    Attributes:
        max_bytes: results up to this many bytes may be stored even when that frees nothing.
    """

    name: ClassVar[str] = "fold_constants"
    needs: ClassVar[tuple[Any, ...]] = ()
    exactness: ClassVar[Exactness] = Exactness.SAME_BITS

    max_bytes: int = 1 << 20

    def plan(self, program: Program, facts: Facts) -> Plan:
        """Plans one action per constant value that something not constant reads."""
        found = _Constants(program, self.max_bytes)
        for node in program.graph.nodes:
            found.add(node)
        roots = {node for node in found.stored if found.is_root(node)}
        values = evaluate(program, roots)
        actions = [_fold(program, node, values[node]) for node in found.stored if node in roots]
        skips = [Skip(RULE, *item) for item in found.refused()]
        return Plan(tuple(actions), tuple(skips))


@dataclass
class _Constants:
    """Which values are constant, which of them to fold, and the bytes each would store.

    Attributes:
        stored: constant value -> bytes of weights kept if folding stops at it.
        reasons: constant value -> why it is not folded, or None.
        shared: views of weights or values that have other readers.
    """

    program: Program
    max_bytes: int
    stored: dict[fx.Node, int] = field(default_factory=dict)
    reasons: dict[fx.Node, str | None] = field(default_factory=dict)
    shared: set[fx.Node] = field(default_factory=set)

    def add(self, node: fx.Node) -> None:
        """Looks at `node`, after all its operands."""
        reads = ops.read_nodes(node)
        if not _is_fixed(node) or not all(self._is_known(o) for o in reads):
            return
        alone = [o for o in reads if len(o.users) == 1]
        freed = sum(self.stored.get(o, _bytes(o)) for o in alone)
        if ops.is_view(node) and (not alone or alone[0] in self.shared):
            self.shared.add(node)
        reason = self._why_not(node, freed)
        self.reasons[node] = reason
        self.stored[node] = freed if reason else _bytes(node)

    def is_root(self, node: fx.Node) -> bool:
        """Whether `node` is folded and read by something that is not."""
        folded = self.reasons[node] is None
        return folded and any(self.reasons.get(user, "no") is not None for user in node.users)

    def refused(self) -> Iterator[tuple[str, str]]:
        """Yields name and reason of values left alone that something not constant reads."""
        for node, reason in self.reasons.items():
            if reason and any(user not in self.stored for user in node.users):
                yield node.name, reason

    def _is_known(self, node: fx.Node) -> bool:
        return node in self.stored or node.op == "get_attr" or type(node.meta["val"]) is int

    def _why_not(self, node: fx.Node, freed: int) -> str | None:
        size = _bytes(node)
        if self.program.is_fake:
            return "the weights are fake: there is nothing to compute with"
        if not isinstance(node.meta["val"], Tensor):
            return ""  # several values: each is looked at by itself
        if any(user.op == "output" for user in node.users):
            return "it is returned, and callers own outputs"
        if node in self.shared:
            return "it is a view of a value that others read too: it costs nothing, a copy would"
        if ops.is_view(node) and size != _bytes(node.all_input_nodes[0]):
            return "a view that repeats or leaves out elements costs nothing"
        if size > max(self.max_bytes, freed):
            return f"it would store {size} bytes and free {freed}"
        return None


def _is_fixed(node: fx.Node) -> bool:
    """Whether the node is a pure op whose result has no symbolic size."""
    value = node.meta.get("val")
    tensors = value if isinstance(value, list | tuple) else [value]
    return (
        node.op == "call_function"
        and ops.is_pure(node)
        and all(isinstance(t, Tensor) and all(type(n) is int for n in t.shape) for t in tensors)
    )


def _bytes(node: fx.Node) -> int:
    value = node.meta["val"]
    return value.nbytes if isinstance(value, Tensor) else 0


def _fold(program: Program, node: fx.Node, value: Tensor) -> Action:
    name = f"{node.name}_folded"
    while name in program.weights:
        name += "_again"
    source = ", ".join(o.name for o in node.all_input_nodes) or "literals"
    edits = (SetWeight(name, _own(value), source), Replace(node.name, WeightRef(name)))
    reason = f"{value.nbytes} bytes that are the same for every input"
    return Action(RULE, node.name, edits, reason, {"bytes": value.nbytes})


def _own(value: Tensor) -> Tensor:
    """Returns `value` with storage of its own size and the same strides."""
    if value.untyped_storage().nbytes() == value.nbytes:
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype).copy_(value)
