"""Drops a run of layers behind which the residual stream points where it pointed before.

x1 = layer(x)
x2 = layer(x1)      ->    next layer(x)
x3 = layer(x2)
next layer(x3)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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
    drop_block,
    named,
    saving,
)
from redpass.plan import Action, Exactness, Plan, Skip
from redpass.program import Program

RULE = "drop_span.angle"


@dataclass(frozen=True)
class DropSpan:
    """Removes several layers that follow one another, as one action.

    What: whoever reads the stream behind the last of them reads it before the first instead; their
    cache entries leave the inputs and outputs.
    When: never by itself. Every span is a candidate with its predicted loss, the mean angle
    `arccos(cos(x_l, x_{l+n})) / pi` between the stream before and behind it; a budget decides on
    measured quality.
    Not tried: a span that reaches over the whole stream.
    Costs: one calibration run, and quality measurements.
    Source: Gromov et al. 2024, "The Unreasonable Ineffectiveness of the Deeper Layers",
    arXiv:2403.17887.

    Attributes:
        lengths: how many layers a span may have.
        only: labels (`layers.3-5`) of the spans to drop; then no data is needed.
    """

    name: ClassVar[str] = "drop_span"
    needs: ClassVar[tuple[Any, ...]] = (structure, blocks, cost, stream_statistics)
    exactness: ClassVar[Exactness] = Exactness.APPROXIMATE

    lengths: tuple[int, ...] = (2, 3, 4)
    only: tuple[str, ...] = ()

    def plan(self, program: Program, facts: Facts) -> Plan:
        """Plans one action a span, the smallest angle first."""
        if not facts.get(structure).branches:
            return Plan(skips=(Skip(RULE, "graph", NO_STREAM),))
        layers = facts.get(blocks)
        if not layers:
            return Plan(skips=(Skip(RULE, "graph", NO_LAYERS),))
        spans = tuple(self._spans(layers))
        if self.only:
            spans = named(self.only, tuple(_all_spans(layers)), self.name)
        plan = Plan.of(self._judge(span, facts) for span in spans)
        skips = plan.skips if self.only else (*plan.skips, *self._too_long(layers))
        return Plan(tuple(sorted(plan.actions, key=lambda a: a.loss or 0.0)), skips)

    def _too_long(self, layers: Sequence[Block]) -> Iterator[Skip]:
        for length in self.lengths:
            if not any(True for _ in _spans_of(layers, length)):
                yield Skip(RULE, f"length {length}", "no stream has more layers than that")

    def _spans(self, layers: Sequence[Block]) -> Iterator[Block]:
        wrong = [length for length in self.lengths if length < 2]
        if wrong:
            raise UsageError(f"a span of {wrong[0]} layers", place=self.name, hint="at least 2")
        return (span for n in self.lengths for span in _spans_of(layers, n))

    def _judge(self, block: Block, facts: Facts) -> Action | Skip:
        pair: tuple[float, float] | None = (0.0, 0.0)
        if not self.only:
            pair = facts.get(stream_statistics).between(block.entry, block.after)
        if pair is None or not is_removable(facts.program, block):
            return Skip(RULE, block.label, WIDTH_CHANGES)
        angle = None if self.only else pair[1]
        shown = "named by the user"
        if angle is not None:
            shown = f"the stream turns by {angle:.4f} half turns over them"
        return Action(
            RULE,
            block.label,
            drop_block(block),
            f"layers in a row, {shown}",
            {} if angle is None else {"angle": angle},
            saving(facts, block.branches),
            angle,
        )


def _all_spans(layers: Sequence[Block]) -> Iterator[Block]:
    return (span for n in range(2, len(layers)) for span in _spans_of(layers, n))


def _spans_of(layers: Sequence[Block], length: int) -> Iterator[Block]:
    """Runs of `length` layers of one stream, less than all of it."""
    for first in range(len(layers) - length + 1):
        part = layers[first : first + length]
        whole = [layer for layer in layers if layer.stream == part[0].stream]
        if part[-1].stream == part[0].stream and length < len(whole):
            branches = tuple(branch for layer in part for branch in layer.branches)
            label = f"{part[0].label}-{part[-1].label.rpartition('layers.')[2]}"
            yield Block(label, branches, part[0].place, part[0].stream)
