"""Replaces a layer by running its neighbour again, where that is better than dropping it.

x1 = x + linear(x, w0)          x1 = x + linear(x, w0)
x2 = x1 + linear(x1, w1)   ->   x2 = x1 + linear(x1, w0)      w1 turned the stream more than w0 errs
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from redpass.analysis import cost, structure
from redpass.analysis.blocks import blocks
from redpass.analysis.swaps import Swap, pairs, swaps
from redpass.facts import Facts
from redpass.passes.depth import borrow_weights, saving_of_weights
from redpass.passes.share_layers import plan_pairs
from redpass.plan import Action, Exactness, Plan, Skip
from redpass.program import Program

RULE = "reuse_layers.again"


@dataclass(frozen=True)
class ReuseLayers:
    """Runs a neighbour a second time in place of a layer that would otherwise be dropped.

    What: the layer's weights go, its place in the stream is taken by the neighbour with the same
    weights; the second run has a cache entry of its own, the one of the layer it stands for.
    When: never by itself, and only where the neighbour gives a stream nearer to the layer's than
    leaving the layer out does; beside `drop_layers` in one search both are candidates.
    Not tried: neighbours whose graph differs (another mask, another width): the reason is told.
    Costs: the layers once more on up to 8 calibration batches, and quality measurements.
    Source: Skrr (Seo et al. 2025, arXiv:2502.08690), whose re-use step this is.

    Attributes:
        only: pairs (`layers.4=layers.3`: the second runs again in the first's place); then no
            data is needed and nothing else is planned.
    """

    name: ClassVar[str] = "reuse_layers"
    needs: ClassVar[tuple[Any, ...]] = (structure, blocks, cost, pairs, swaps)
    exactness: ClassVar[Exactness] = Exactness.APPROXIMATE

    only: tuple[str, ...] = ()

    def plan(self, program: Program, facts: Facts) -> Plan:
        """Plans one action a pair, the least effect first."""
        judge = partial(self._judge, program)
        return plan_pairs(self.name, self.only, facts, RULE, judge)

    def _judge(self, program: Program, key: str, swap: Swap) -> Action | Skip:
        if swap.twin.fault:
            return Skip(RULE, key, f"the neighbour cannot stand for it: {swap.twin.fault}")
        if not self.only and swap.effect >= swap.dropped:
            return Skip(RULE, key, "leaving the layer out turns the stream less")
        edits = borrow_weights(swap.twin)
        if not edits:
            return Skip(RULE, key, "it has the weights of its neighbour already")
        shown = "named by the user"
        if not self.only:
            shown = f"1 - cos {swap.effect:.4f}, left out {swap.dropped:.4f}"
        return Action(
            RULE,
            key,
            edits,
            f"{swap.by} once more in place of {swap.layer}, {shown}",
            {} if self.only else {"effect": swap.effect, "dropped": swap.dropped},
            saving_of_weights(program, swap.twin),
            None if self.only else swap.effect,
        )
