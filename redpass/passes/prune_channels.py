"""Cuts channels between weights and fits what reads them anew.

h = silu(linear(x, gate)) * linear(x, up)    [512]     ->    [384]
y = linear(h, down)                                          down fitted to the 384 that are left
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from redpass.analysis import cost, structure
from redpass.analysis.linears import linears
from redpass.analysis.rungs import check_rungs, check_word
from redpass.analysis.widths.cuts import Rung, removal_order, rungs
from redpass.analysis.widths.ladders import KINDS, ladder, named, saving, step_of, uniform
from redpass.analysis.widths.narrowing import Width, narrow, widths
from redpass.analysis.widths.places import ChannelPlaces, channel_places
from redpass.analysis.widths.statistics import views, why_not_measured
from redpass.facts import Facts
from redpass.plan import Action, Exactness, Plan, Skip
from redpass.program import Program

RULE = "prune_channels.refit"


@dataclass(frozen=True)
class PruneChannels:
    """Leaves out channels that the layers which read them can do without.

    What: hidden widths of feed-forwards (plain, gated, fused gate and up), channels of convolutions
    through batch norms, sums, concatenations, gates, depthwise and grouped convolutions (of those,
    whole groups), and hidden widths between other linears. All weights that have the width are cut;
    those that read it are fitted anew by ridge regression, biases (or a batch norm's running mean
    behind) take up what is constant.
    When: never by itself. Each width has a ladder of candidates; the predicted loss is the squared
    error put into the residual stream (or the reader's output) over its squared norm, on
    calibration batches that were not fitted on.
    Not tried: widths that a norm or a softmax mixes, public sizes, inner widths of experts.
    Costs: one calibration run for as many places as 4 GiB of Gram matrices hold, time with the cube
    of the width, memory for the new weights of all rungs. Replaying a recipe needs the same data.
    Source: see `redpass.analysis.widths.cuts`.

    Attributes:
        kinds: `feed-forward`, `channels` (convolutions), `hidden` (between other linears).
        shares: what is left of a width, one candidate each.
        multiple: what the widths left are a multiple of.
        refit: whether readers are fitted anew.
        together: feed-forwards of one width are cut alike, in one candidate a share, as the
            configuration of a Hugging Face model can say it.
        only: candidates by name (`layers.3.feed-forward@384`), of any width.
    """

    name: ClassVar[str] = "prune_channels"
    needs: ClassVar[tuple[Any, ...]] = (structure, cost, linears, widths, channel_places)
    exactness: ClassVar[Exactness] = Exactness.APPROXIMATE
    fits: ClassVar[bool] = True

    kinds: tuple[str, ...] = ("feed-forward", "channels", "hidden")
    shares: tuple[float, ...] = (0.75, 0.5, 0.25)
    multiple: int = 8
    refit: bool = True
    together: bool = False
    only: tuple[str, ...] = ()

    def plan(self, program: Program, facts: Facts) -> Plan:
        """Plans a ladder of actions for each width, widest first."""
        check_rungs(self.name, self.shares, self.multiple)
        for kind in self.kinds:
            check_word(self.name, "kind of width", kind, KINDS)
        found = facts.get(channel_places)
        if not found.by_label:
            return Plan(skips=(Skip(RULE, "graph", "no linear reads what another one computes"),))
        wanted = named(self.name, self.only, found, self.multiple) if self.only else None
        skips = list(self._skips(found)) if wanted is None else []
        counts: dict[str, list[int]] = {}
        for label, width in found.by_label.items():
            if label in found.obstacles or found.kinds[label] not in self.kinds:
                continue
            if why := why_not_measured(program, width):
                skips.append(Skip(RULE, label, why))
                continue
            counts[label] = wanted.get(label, []) if wanted is not None else self._counts(width)
            if not counts[label] and wanted is None:
                step = step_of(width, self.multiple)
                reason = f"no smaller width of {width.size} is a multiple of {step}"
                skips.append(Skip(RULE, label, reason))
        actions = list(self._actions(program, facts, {k: v for k, v in counts.items() if v}))
        return Plan(uniform(actions, found) if self.together else tuple(actions), tuple(skips))

    def _counts(self, width: Width) -> list[int]:
        return ladder(width.size, self.shares, step_of(width, self.multiple))

    def _skips(self, found: ChannelPlaces) -> Iterator[Skip]:
        for label, kind in found.kinds.items():
            if kind not in self.kinds:
                yield Skip(RULE, label, f"a width of kind '{kind}' is not a candidate")
            elif label in found.obstacles:
                yield Skip(RULE, label, found.obstacles[label])

    def _actions(
        self, program: Program, facts: Facts, counts: dict[str, list[int]]
    ) -> Iterator[Action]:
        found = facts.get(channel_places)
        places = [(label, found.by_label[label]) for label in counts]
        if not places:
            return
        for label, width, seen in views(program, facts.get(structure), places, facts.data()):
            order = removal_order(width, seen, min(counts[label]), refit=self.refit)
            tokens = seen[0].whole.tokens
            for rung in rungs(width, seen, order, counts[label], refit=self.refit):
                yield self._action(label, rung, tokens, facts)

    def _action(self, label: str, rung: Rung, tokens: int, facts: Facts) -> Action:
        found = facts.get(channel_places)
        width, count = found.by_label[label], len(rung.keep)
        few = f"; only {tokens} tokens for {width.size} channels" if tokens < width.size else ""
        evidence = {"error": rung.error, "unrepaired": rung.unrepaired, "tokens": float(tokens)}
        return Action(
            RULE,
            f"{label}@{count}",
            tuple(narrow(found.table, width, rung.keep, rung.repairs, facts.program)),
            f"{count} of {width.size} channels are left: {100 * rung.error:.3g}% of what they are "
            f"added to is off, {100 * rung.unrepaired:.3g}% without a repair{few}",
            evidence | {"strength": rung.strength, "share": count / width.size},
            saving(facts, width, count),
            rung.error,
            f"{label}/width",
        )
