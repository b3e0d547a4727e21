"""Lets neighbouring layers that do alike share one set of weights.

x1 = x + linear(x, w0)          x1 = x + linear(x, w0)
x2 = x1 + linear(x1, w1)   ->   x2 = x1 + linear(x1, w0)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from redpass.analysis import cost, structure
from redpass.analysis.blocks import blocks
from redpass.analysis.swaps import Swap, pairs, swaps
from redpass.errors import UsageError, nearest
from redpass.facts import Facts
from redpass.passes.depth import NO_LAYERS, NO_STREAM, borrow_weights, saving_of_weights
from redpass.plan import Action, Exactness, Plan, Skip
from redpass.program import Program

RULE = "share_layers.effect"


@dataclass(frozen=True)
class ShareLayers:
    """Makes a layer read its neighbour's weights; it saves bytes, and no work.

    What: every weight of the layer is replaced by the one that stands in its place in the
    neighbour. The layer keeps its own place, its masks and its cache entry.
    When: never by itself. Each layer with each neighbour of the same form is a candidate, with the
    predicted loss `1 - cos` between what it gives and what it would give; a budget decides.
    Not tried: layers that are not direct neighbours, averaged weights, or training.
    Costs: the layers once more on up to 8 calibration batches, and quality measurements.
    Source: FoldGPT (Liu et al. 2024, arXiv:2407.00928), without its fine-tuning.

    Attributes:
        only: pairs to share (`layers.4=layers.3`: the first runs on the second's weights); then
            no data is needed and nothing else is planned.
    """

    name: ClassVar[str] = "share_layers"
    needs: ClassVar[tuple[Any, ...]] = (structure, blocks, cost, pairs, swaps)
    exactness: ClassVar[Exactness] = Exactness.APPROXIMATE

    only: tuple[str, ...] = ()

    def plan(self, program: Program, facts: Facts) -> Plan:
        """Plans one action a pair, the least effect first."""
        judge = partial(self._judge, program)
        return plan_pairs(self.name, self.only, facts, RULE, judge)

    def _judge(self, program: Program, key: str, swap: Swap) -> Action | Skip:
        if swap.twin.fault:
            return Skip(RULE, key, f"the layers are no twins: {swap.twin.fault}")
        edits = borrow_weights(swap.twin)
        if not edits:
            return Skip(RULE, key, "they share all their weights already")
        shown = (
            "named by the user" if self.only else f"its result turns by 1 - cos {swap.effect:.4f}"
        )
        return Action(
            RULE,
            key,
            edits,
            f"{swap.layer} on the weights of {swap.by}, {shown}",
            {} if self.only else {"effect": swap.effect, "dropped": swap.dropped},
            saving_of_weights(program, swap.twin),
            None if self.only else swap.effect,
        )


def plan_pairs(
    name: str,
    only: tuple[str, ...],
    facts: Facts,
    rule: str,
    judge: Callable[[str, Swap], Action | Skip],
) -> Plan:
    """Judges each pair of layers, and plans the least effect first.

    Args:
        name: the pass that is planning, for messages.
        only: the pairs that the user named; none for all of them.
        rule: what a skip of the whole graph is filed under.
        judge: a pair by its key -> what to do with it.
    """
    if not facts.get(structure).branches:
        return Plan(skips=(Skip(rule, "graph", NO_STREAM),))
    if not facts.get(blocks):
        return Plan(skips=(Skip(rule, "graph", NO_LAYERS),))
    plan = Plan.of(judge(*pair) for pair in _pairs(only, facts, name).items())
    return Plan(tuple(sorted(plan.actions, key=lambda a: a.loss or 0.0)), plan.skips)


def _pairs(only: tuple[str, ...], facts: Facts, place: str) -> Mapping[str, Swap]:
    """Returns the pairs that the user named, unmeasured, or all of them, measured."""
    if not only:
        return facts.get(swaps)
    known = facts.get(pairs)
    for key in only:
        if key not in known:
            raise UsageError(f"no pair of layers '{key}'", place=place, hint=nearest(key, known))
    return {key: known[key] for key in only}
