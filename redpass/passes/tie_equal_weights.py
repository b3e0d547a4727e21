"""Lets weights with equal contents be one weight.

a = weight layers.0.w
b = weight layers.1.w    (the same bits)    ->    a = weight layers.0.w
y = linear(linear(x, a), b)                       y = linear(linear(x, a), a)
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from redpass import ops
from redpass.facts import Facts
from redpass.plan import Action, Edit, Exactness, Insert, Plan, Ref, Replace, Skip
from redpass.program import Program

EQUAL, TRANSPOSED = "tie_equal_weights.equal", "tie_equal_weights.transposed"
SAMPLES = 64
CHUNK = 1 << 24
"""Elements compared at a time: what a comparison needs in memory beside the weights."""


@dataclass(frozen=True)
class TieEqualWeights:
    """Stores weights that hold the same bits once.

    What: weights of equal dtype, shape, strides and contents; and matrices that are the transpose
    of another, where all readers look rows up (embeddings): these read a transposed view.
    When: bits are compared, so -0.0 and NaN count as they are stored. A matrix product with the
    transposed layout may round differently and is left alone.
    Not tried: weights equal up to a factor or a permutation; parts of weights.
    Costs: reads a few elements of each weight, and all of those whose samples agree.

    Attributes:
        min_bytes: smaller weights are left alone. By default none are: tables of a few bytes, one
            a layer, keep everything computed from them apart.
    """

    name: ClassVar[str] = "tie_equal_weights"
    needs: ClassVar[tuple[Any, ...]] = ()
    exactness: ClassVar[Exactness] = Exactness.SAME_BITS

    min_bytes: int = 0

    def plan(self, program: Program, facts: Facts) -> Plan:
        """Plans one action per weight that repeats an earlier one."""
        if program.is_fake:
            reason = "the weights are fake: there are no contents to compare"
            return Plan(skips=(Skip(EQUAL, "weights", reason),))
        return Plan.of(self._judge(pair) for pair in _pairs(program))

    def _judge(self, pair: Pair) -> Action | Skip:
        rule = TRANSPOSED if pair.turned else EQUAL
        if reason := self._why_not(pair):
            return Skip(rule, pair.node.name, reason)
        edits: tuple[Edit, ...] = (Replace(pair.node.name, pair.first.name),)
        if pair.turned:
            name = f"{pair.first.name}_t"
            turn = Insert(name, torch.ops.aten.t.default, (Ref(pair.first.name),), pair.node.name)
            edits = (turn, Replace(pair.node.name, name))
        what = "is the transpose of" if pair.turned else "holds the same bits as"
        reason = f"{pair.node.target} {what} {pair.first.target}"
        saving = {"bytes": pair.value.nbytes, "parameters": pair.value.numel()}
        return Action(rule, pair.node.name, edits, reason, {}, saving)

    def _why_not(self, pair: Pair) -> str | None:
        if pair.value.nbytes < self.min_bytes:
            return f"{pair.value.nbytes} bytes are fewer than min_bytes"
        looks_up = all(
            ops.is_call(user, *ops.LOOKUPS) and user.args.count(pair.node) == 1
            for user in pair.node.users
        )
        if pair.has_other_strides and not looks_up:
            return f"equal to {pair.first.target} in another layout, and not only looked up"
        return None


@dataclass(frozen=True)
class Pair:
    """A weight and the earlier one that it repeats, as it is or turned."""

    node: fx.Node
    first: fx.Node
    value: Tensor
    turned: bool
    has_other_strides: bool


def _pairs(program: Program) -> Iterator[Pair]:
    known: dict[Hashable, list[fx.Node]] = {}
    for node in program.weight_nodes:
        value = program.weights[str(node.target)]
        if not value.numel() or not node.users:
            continue
        for turned in (False, True) if value.dim() == 2 else (False,):
            wanted = value.t() if turned else value
            first = _find(program, known.get(_sample(wanted), ()), wanted)
            if first is not None:
                same = program.weights[str(first.target)].stride() == wanted.stride()
                yield Pair(node, first, value, turned, turned or not same)
                break
        else:
            known.setdefault(_sample(value), []).append(node)


def _find(program: Program, nodes: Iterable[fx.Node], wanted: Tensor) -> fx.Node | None:
    return next((n for n in nodes if _is_equal(program.weights[str(n.target)], wanted)), None)


def _sample(value: Tensor) -> Hashable:
    """Returns dtype, shape and the bits of a few elements spread over `value`."""
    spread = torch.linspace(0, value.numel() - 1, min(SAMPLES, value.numel())).long()
    picked = value[torch.unravel_index(spread, value.shape)] if value.dim() else value
    return value.dtype, tuple(value.shape), _bits(picked).numpy().tobytes()


def _is_equal(left: Tensor, right: Tensor) -> bool:
    """Whether two tensors of one shape hold the same bits; compares slice by slice."""
    if left.dim() == 0:
        return torch.equal(_bits(left), _bits(right))
    rows = max(1, CHUNK * len(left) // left.numel())
    pairs = zip(left.split(rows), right.split(rows), strict=True)
    return all(torch.equal(_bits(a), _bits(b)) for a, b in pairs)


def _bits(value: Tensor) -> Tensor:
    return value.detach().contiguous().reshape(-1).view(torch.uint8)
