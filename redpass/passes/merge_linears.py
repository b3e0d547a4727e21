"""Merges linears that read the same value.

q = linear(x, Wq)         m = linear(x, [Wq; Wk; Wv])
k = linear(x, Wk)    ->   q = m[..., 0:a]
v = linear(x, Wv)         k = m[..., a:b];  v = m[..., b:c]
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate, groupby
from typing import Any, ClassVar

import torch
from torch import Tensor

from redpass.analysis.linears import Linear, Linears, can_view, linears, new_name
from redpass.facts import Facts
from redpass.fake import fake_mode
from redpass.plan import Action, Edit, Exactness, Insert, Plan, Ref, Replace, SetWeight, Skip
from redpass.program import Program

aten = torch.ops.aten
RULE = "merge_linears.same_input"


@dataclass(frozen=True)
class MergeLinears:
    """Computes linears of one input as one linear, and hands out slices of its result.

    What: query, key and value projections (of equal or different widths), gate and up.
    When: the weights are read nowhere else, so the merged copy adds no bytes; readers can read a
    slice (a `view` that needs contiguous values cannot); and the input is at most `max_width` wide.
    Not tried: linears of different ops (`linear` with `addmm`), or of different dtypes.
    Costs: one copy of the merged weights. The figures behind the limits, time after / before,
    geometric mean over 1, 8, 16, 128 and 1024 tokens, one core:

        width                           384   768   1024  2048
        q, k, v, bias, ONNX Runtime     0.91  0.94  0.97  1.01
        q, k, v, bias, eager            0.90  1.00  1.03  1.12
        q, k, v, ONNX Runtime           0.96  0.95  0.97  1.00
        gate, up, ONNX Runtime          1.00  0.99  0.99  0.98
        gate, up, eager                 0.97  1.08  1.05  1.16

    The gain is in the calls, up to 20% at one token. Wide layers have none to give, and slicing
    many tokens costs a copy (1.03 to 1.06 at 1024 tokens).

    Attributes:
        max_width: the widest input whose linears are merged.
        max_growth: linears together more than this many times as wide as their input stay apart:
            gate and up gain nothing, and many results would all be alive at once.
    """

    name: ClassVar[str] = "merge_linears"
    needs: ClassVar[tuple[Any, ...]] = (linears,)
    exactness: ClassVar[Exactness] = Exactness.WITHIN_TOLERANCE

    max_width: int = 768
    max_growth: int = 4

    def plan(self, program: Program, facts: Facts) -> Plan:
        """Plans one action per value that several linears of one form read."""
        table = facts.get(linears)
        return Plan.of(
            item
            for readers in table.by_input.values()
            for group in _forms(readers, program)
            for item in self._judge(group, table, program)
        )

    def _judge(
        self, group: tuple[Linear, ...], table: Linears, program: Program
    ) -> Iterator[Action | Skip]:
        width, total = group[0].ins, sum(linear.outs for linear in group)
        if width > self.max_width:
            reason = (
                f"the input is wider than {self.max_width}: merging was measured to gain nothing"
            )
            yield Skip(RULE, group[0].input, reason)
            return
        if total > self.max_growth * width:
            reason = f"the results are more than {self.max_growth} times as wide as the input"
            yield Skip(RULE, group[0].input, reason)
            return
        reasons = {linear: _why_not(linear, table, program) for linear in group}
        yield from (Skip(RULE, item.node, reason) for item, reason in reasons.items() if reason)
        fit = tuple(linear for linear, reason in reasons.items() if not reason)
        if len(fit) > 1:
            yield _merge(fit, program)


def _forms(readers: tuple[Linear, ...], program: Program) -> Iterator[tuple[Linear, ...]]:
    """Splits the readers of a value in groups that one op can compute."""

    def form(linear: Linear) -> tuple[bool, str]:
        return linear.transposed, str(program.weights[linear.weight].dtype)

    for _, group in groupby(sorted(readers, key=form), form):
        found = tuple(group)
        if len(found) > 1:
            yield found


def _merge(group: tuple[Linear, ...], program: Program) -> Action:
    first = group[0]
    edits: list[Edit] = []
    weight, bias = new_name(program, first.weight, "merged"), None
    matrix = torch.cat([linear.matrix(program) for linear in group])
    edits.append(first.store(weight, matrix, " + ".join(linear.weight for linear in group)))
    if any(linear.bias for linear in group):
        bias = f"{weight}_bias"
        edits.append(SetWeight(bias, torch.cat([_offset(linear, program) for linear in group])))
    merged = f"{first.node}_merged"
    edits.append(first.call(merged, first.input, weight, bias, first.node))
    ends = tuple(accumulate(linear.outs for linear in group))
    for linear, end in zip(group, ends, strict=True):
        part = f"{linear.node}_part"
        args = (Ref(merged), -1, end - linear.outs, end)
        edits += [Insert(part, aten.slice.Tensor, args, first.node), Replace(linear.node, part)]
    names = ", ".join(linear.node for linear in group)
    return Action(
        RULE,
        first.input,
        tuple(edits),
        f"{names} read the same value: one linear {first.ins} -> {ends[-1]} computes them",
        {"linears": len(group), "width": first.ins},
    )


def _offset(linear: Linear, program: Program) -> Tensor:
    bias = linear.offset(program)
    return program.weights[linear.weight].new_zeros(linear.outs) if bias is None else bias


def _why_not(linear: Linear, table: Linears, program: Program) -> str | None:
    if name := table.shared(linear.names):
        return f"{name} is read elsewhere too, so the merged copy would add bytes"
    node = program.nodes[linear.node]
    mode, value = fake_mode(program), node.meta["val"]
    with mode:
        sliced = value.new_empty((*value.shape[:-1], 2 * linear.outs))[..., : linear.outs]
    if not can_view(mode, node, sliced):
        return "a view that reads it needs contiguous values"
    return None
