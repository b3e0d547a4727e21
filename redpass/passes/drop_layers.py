"""Drops whole layers that barely turn the residual stream.

x1 = x + attention(norm(x))
x2 = x1 + mlp(norm(x1))        ->    next layer(x)
next layer(x2)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from redpass.analysis import cost, structure
from redpass.analysis.block_influence import WIDTH_CHANGES
from redpass.analysis.blocks import Block, blocks, is_removable
from redpass.analysis.stream_statistics import stream_statistics
from redpass.errors import UsageError
from redpass.facts import Facts
from redpass.passes.depth import (
    NO_LAYERS,
    NO_STREAM,
    check_some_stay,
    drop_block,
    named,
    saving,
)
from redpass.plan import Action, Exactness, Plan, Skip
from redpass.program import Program

RULE = "drop_layers.similar"


@dataclass(frozen=True)
class DropLayers:
    """Removes layers, each with all its branches, its norms and its cache entries.

    What: whoever reads the stream behind a layer reads it before the layer instead.
    When: never by itself. Each layer is a candidate with its predicted loss, Block Influence
    `1 - E cos(x_i, x_{i+1})` over calibration tokens; a budget decides on measured quality.
    Not tried: layers of a stream that has one layer only, or between which the stream changes its
    width.
    Costs: one calibration run, and quality measurements.
    Source: ShortGPT (Men et al. 2024, arXiv:2403.03853) for the score, SLEB (Song et al. 2024,
    arXiv:2402.09025) for dropping one at a time on measured loss.

    Attributes:
        min_similarity: layers below this mean cosine are not tried.
        count: candidates are this many layers at most, those with the least predicted loss; 0
            for all. Less than a stream has.
        only: labels (`layers.3`) of the layers to drop; then no data is needed and nothing else
            is planned.
    """

    name: ClassVar[str] = "drop_layers"
    needs: ClassVar[tuple[Any, ...]] = (structure, blocks, cost, stream_statistics)
    exactness: ClassVar[Exactness] = Exactness.APPROXIMATE

    min_similarity: float = -1.0
    count: int = 0
    only: tuple[str, ...] = ()

    def plan(self, program: Program, facts: Facts) -> Plan:
        """Plans one action a layer, the least loss first."""
        if not facts.get(structure).branches:
            return Plan(skips=(Skip(RULE, "graph", NO_STREAM),))
        found = facts.get(blocks)
        if not found:
            return Plan(skips=(Skip(RULE, "graph", NO_LAYERS),))
        if self.only:
            check_some_stay(self.only, found, self.name)
        if self.count >= len(found):
            text = f"{self.count} of {len(found)} layers cannot be dropped"
            raise UsageError(text, place=self.name, hint=f"at most {len(found) - 1}")
        wanted = named(self.only, found, self.name) if self.only else found
        plan = Plan.of(self._judge(block, facts) for block in wanted)
        actions = sorted(plan.actions, key=lambda a: a.loss or 0.0)
        return Plan(tuple(actions[: self.count or None]), plan.skips)

    def _judge(self, block: Block, facts: Facts) -> Action | Skip:
        if not is_removable(facts.program, block):
            return Skip(RULE, block.label, WIDTH_CHANGES)
        if self.only:
            return self._drop(block, None, facts)
        pair = facts.get(stream_statistics).between(block.entry, block.after)
        if pair is None:
            return Skip(RULE, block.label, WIDTH_CHANGES)
        cosine = pair[0]
        if cosine < self.min_similarity:
            reason = f"similarity {cosine:.4f} is below {self.min_similarity}"
            return Skip(RULE, block.label, reason)
        return self._drop(block, cosine, facts)

    def _drop(self, block: Block, cosine: float | None, facts: Facts) -> Action:
        shown = "named by the user"
        if cosine is not None:
            shown = f"block influence {1 - cosine:.4f}"
        return Action(
            RULE,
            block.label,
            drop_block(block),
            f"layer of {len(block.branches)} branches, {shown}",
            {} if cosine is None else {"block_influence": 1.0 - cosine},
            saving(facts, block.branches),
            None if cosine is None else 1.0 - cosine,
        )
