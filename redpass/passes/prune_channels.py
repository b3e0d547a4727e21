"""Cuts channels between weights and fits what reads them anew.

h = silu(linear(x, gate)) * linear(x, up)    [512]     ->    [384]
y = linear(h, down)                                          down fitted to the 384 that are left
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from redpass.analysis import cost, structure
from redpass.analysis.linears import linears, opaque
from redpass.analysis.rungs import check_rungs, check_word
from redpass.analysis.widths import ladders, routed, statistics
from redpass.analysis.widths.cuts import Rung
from redpass.analysis.widths.experts import ExpertRung, expert_rungs, narrow_experts
from redpass.analysis.widths.ladders import KINDS, ladder, named, saving, step_of, uniform
from redpass.analysis.widths.narrowing import Width, narrow, widths
from redpass.analysis.widths.places import ChannelPlaces, channel_places
from redpass.analysis.widths.routed import expert_views
from redpass.analysis.widths.statistics import views
from redpass.facts import Facts
from redpass.plan import Action, Exactness, Plan, Skip
from redpass.program import Program

RULE = "prune_channels.refit"
NOTHING = "no linear or convolution with a plain weight reads what another one computes"


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
    Stacked experts get one width, and each keeps channels of its own, by the tokens routed to it.
    Not tried: widths that a norm or a softmax mixes, public sizes, experts that are not stacked.
    Costs: one calibration run for as many places as 4 GiB of Gram matrices hold, time with the cube
    of the width, memory for the new weights of all rungs. Replaying a recipe needs the same data.
    Source: see `redpass.analysis.widths.cuts`.

    Attributes:
        kinds: `feed-forward`, `experts`, `channels` (convolutions), `hidden` (between linears).
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

    kinds: tuple[str, ...] = ("feed-forward", "experts", "channels", "hidden")
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
        if not found.by_label and not self.only:
            return Plan(skips=(Skip(RULE, "graph", NOTHING), *self._opaque(program, facts)))
        wanted = named(self.name, self.only, found, self.multiple) if self.only else None
        skips = [*self._skips(found), *self._opaque(program, facts)] if wanted is None else []
        counts: dict[str, list[int]] = {}
        for label, width in found.by_label.items():
            if label in found.obstacles or found.kinds[label] not in self.kinds:
                continue
            is_stack = found.kinds[label] == "experts"
            if why := (routed if is_stack else statistics).why_not_measured(program, width):
                skips.append(Skip(RULE, label, why))
                continue
            counts[label] = wanted.get(label, []) if wanted is not None else self._counts(width)
            if not counts[label] and wanted is None:
                step = step_of(width, self.multiple)
                reason = f"no smaller width of {width.size} is a multiple of {step}"
                skips.append(Skip(RULE, label, reason))
        counts = {label: each for label, each in counts.items() if each}
        actions = list(self._actions(program, facts, counts)) if counts else []
        return Plan(uniform(actions, found) if self.together else tuple(actions), tuple(skips))

    def _opaque(self, program: Program, facts: Facts) -> Iterator[Skip]:
        for name, why in opaque(program, facts.get(linears)):
            yield Skip(RULE, name, why)

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
        places = [(n, found.by_label[n]) for n in counts if n not in found.sites]
        stacks = [(n, found.by_label[n], found.sites[n]) for n in counts if n in found.sites]
        for label, width, looks, rows in expert_views(program, stacks, facts.data()):
            for all_ in expert_rungs(width, looks, rows, counts[label], refit=self.refit):
                yield self._action(label, all_, facts)
        data, blocks = facts.data(), facts.journal.blocks
        for label, width, seen in views(program, facts.get(structure), places, data, blocks):
            made = ladders.made_rungs(facts, label, width, seen, counts[label], refit=self.refit)
            for rung in made:
                yield self._action(label, rung, facts, seen[0].whole.tokens)

    def _action(self, label: str, rung: Rung | ExpertRung, facts: Facts, tokens: int = 0) -> Action:
        found, program = facts.get(channel_places), facts.program
        width, bare = found.by_label[label], 100 * rung.unrepaired
        if isinstance(rung, ExpertRung):
            edits = tuple(narrow_experts(found.table, width, rung, program))
            evidence, few = rung.evidence, rung.few(width.size)
        else:
            edits = tuple(narrow(found.table, width, rung.keep, rung.repairs, program))
            evidence = {"tokens": float(tokens), "strength": rung.strength}
            few = f"only {tokens} tokens for {width.size} channels" * (tokens < width.size)
        return Action(
            RULE,
            f"{label}@{rung.count}",
            edits,
            f"{rung.count} of {width.size} channels are left: {100 * rung.error:.3g}% of what they "
            f"are added to is off, {bare:.3g}% without a repair{few and '; '}{few}",
            {"error": rung.error, "unrepaired": rung.unrepaired, "share": rung.count / width.size}
            | evidence,
            saving(facts, width, rung.count),
            rung.error,
            f"{label}/width",
        )
