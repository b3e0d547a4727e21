"""Puts `redpass::` ops where the graph computes what they do, if that is faster there.

It is planned like a pass: actions with their reasons, and a skip for every place left alone. An
op is worth its place only where it was measured to win on this device (see `tuning`); on a CPU
never, unless asked for.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch

from redpass.analysis.structure import structure
from redpass.codegen import ops as kernels_of
from redpass.codegen.patterns import PATTERNS, Site
from redpass.codegen.tuning import Records, Shape
from redpass.facts import Facts
from redpass.plan import Action, Exactness, Insert, Plan, Ref, Replace, Skip, WeightRef
from redpass.program import Program

DECODE: Mapping[str, int] = {"batch": 2, "seq": 1, "past": 512}
PREFILL: Mapping[str, int] = {"batch": 2, "seq": 512, "past": 0}
"""Sizes at which a kernel is asked whether it takes a place; one of them must do."""


@dataclass(frozen=True)
class LowerHotPaths:
    """Replaces chains of ops by `redpass::` ops that have a kernel.

    What: the places that `patterns` finds.
    When: `kernels` is `triton`, or it is `auto` and `records` say that the kernel is faster than
    the best of what PyTorch has, on this device. Otherwise each place is a skip with the reason.
    Not tried: places with sizes no kernel takes; they keep their ATen ops, which are near ideal.
    Costs: one `structure` analysis.
    """

    name: ClassVar[str] = "lower_hot_paths"
    needs: ClassVar[tuple[Any, ...]] = (structure,)
    exactness: ClassVar[Exactness] = Exactness.WITHIN_TOLERANCE

    kernels: str = "auto"
    records: Records = field(default_factory=Records, repr=False, compare=False)

    def plan(self, program: Program, facts: Facts) -> Plan:
        """Plans one action a place."""
        if self.kernels == "reference":
            return Plan((), (Skip("lower", "graph", "reference kernels were asked for"),))
        if self.kernels == "auto" and self.records.device is None:
            hint = "on a CPU the ATen ops stay; --kernels triton lowers anyway"
            return Plan((), (Skip("lower", "graph", f"no GPU: {hint}"),))
        kernels_of.register()
        return Plan.of(self._judged(program, facts))

    def _judged(self, program: Program, facts: Facts) -> Iterator[Action | Skip]:
        for item in find_sites(program, facts):
            if isinstance(item, Skip):
                yield item
                continue
            refusal, verdict = why_not(program, item), self._verdict(program, item)
            if refusal or not verdict[0]:
                yield Skip(f"lower.{item.op}", item.target, refusal or verdict[1])
            else:
                yield action(item, verdict[1])

    def _verdict(self, program: Program, site: Site) -> tuple[bool, str]:
        """Whether the kernel wins wherever it would run, in decoding and in prefill."""
        if self.kernels == "triton":
            return True, "kernels were asked for"
        op, found = kernels_of.OPS[site.op], dict[Shape, tuple[bool, str]]()
        for sizes in (DECODE, PREFILL):
            values = site.values(program, sizes)
            if op.pays(*values) and not op.refuses(*values):
                shape = Shape.of(op, values)
                found.setdefault(replace(shape, sizes=()), self.records.verdict(shape))
        lost = [reason for wins, reason in found.values() if not wins]
        if lost or not found:
            return False, lost[0] if lost else "at no size is the kernel the better choice"
        return True, "; ".join(reason for _, reason in found.values())


def find_sites(program: Program, facts: Facts) -> Iterator[Site | Skip]:
    """Yields the places of all patterns; a node belongs to the first that wants it."""
    found, taken = facts.get(structure), set[str]()
    order = {name: place for place, name in enumerate(program.nodes)}
    readers = {str(node.target): node.name for node in program.weight_nodes}
    for find in PATTERNS:
        for item in find(program, found):
            if isinstance(item, Skip):
                yield item
            elif item.covers & taken:
                reason = "its nodes are part of another hot path"
                yield Skip(f"lower.{item.op}", item.target, reason)
            elif late := _late(item, order, readers):
                reason = f"'{late}' is computed after the place it is needed at"
                yield Skip(f"lower.{item.op}", item.target, reason)
            else:
                taken |= item.covers
                yield item


def _late(site: Site, order: Mapping[str, int], readers: Mapping[str, str]) -> str:
    """Returns an operand that does not stand before the place of the op, or ""."""
    steps = (item for step in site.prepared for item in step.args)
    for item in (*site.arguments, *steps):
        name = readers.get(item.name) if isinstance(item, WeightRef) else None
        name = item.name if isinstance(item, Ref) else name
        if name is not None and name in order and order[name] >= order[site.before]:
            return name
    return ""


def why_not(program: Program, site: Site) -> str:
    """Returns "" or why the op's kernel takes a place neither in decoding nor in prefill."""
    op = kernels_of.OPS[site.op]
    reasons = [op.refuses(*site.values(program, sizes)) for sizes in (DECODE, PREFILL)]
    return reasons[0] if all(reasons) else ""


def action(site: Site, why: str) -> Action:
    """Returns the action that puts the op in its place."""
    name = f"{site.target}_{site.op}"
    call = getattr(torch.ops.redpass, site.op).default
    edits: list[Any] = [*site.weights, *site.prepared]
    edits.append(Insert(name, call, site.arguments, site.before))
    if len(call._schema.returns) == 1:
        edits.append(Replace(site.results[0], name))
    else:
        for place, result in enumerate(site.results):
            part = f"{name}_{place}"
            if result:
                get = Insert(part, operator.getitem, (Ref(name), place), site.before)
                edits += [get, Replace(result, part)]
    return Action(f"lower.{site.op}", site.target, tuple(edits), f"{site.reason}; {why}")
