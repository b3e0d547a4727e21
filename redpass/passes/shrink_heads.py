"""Gives attention heads fewer channels, in the directions that matter most.

v = linear(x, w_v)            view [.., heads, 64]      v' = linear(x, d w_v)    [.., heads, 40]
y = linear(merge(attend), w_o)                     ->   y' = linear(merge(attend'), w_o')
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from redpass.analysis import cost
from redpass.analysis.heads.axes import Unfit
from redpass.analysis.heads.clover import BASES
from redpass.analysis.heads.savings import kinds_of, saving, width_of
from redpass.analysis.heads.sites import HeadSite, head_sites
from redpass.analysis.heads.widths import HeadWidths, Shapes, head_shapes, head_widths
from redpass.analysis.rungs import check_rungs, check_word
from redpass.errors import UsageError, nearest
from redpass.facts import Facts
from redpass.plan import Action, Exactness, Plan, Skip
from redpass.program import Program

RULE = "shrink_heads.directions"


@dataclass(frozen=True)
class ShrinkHeads:
    """Makes the heads of attention narrower; the number of heads and of ops stays.

    What: value heads with the columns of the output projection that read them, and query and key
    heads. Both are turned into the directions that matter most for what the heads give, and cut;
    the cache shrinks with them. Where rotary positions turn queries and keys, whole pairs of
    channels go, for each key head its own; one complex factor a pair stands in for what is lost
    (with norms of heads a real one, in their gains).
    When: never by itself. Widths of a ladder are candidates; where one linear makes queries, keys
    and values (`heads`: both at once), all widths of a layer are rivals.
    Not tried: queries and keys behind norms without rotary positions, or behind layer norms;
    attention whose heads cannot be followed in the graph, projections that share weights.
    Costs: one calibration run; small eigenproblems.
    Source: CLOVER (Meng et al. 2024, arXiv:2411.17426), here weighted by activations.

    Attributes:
        shares: what is left of a head's width, the ladder.
        multiple: widths are rounded down to multiples of this.
        basis: what directions are chosen by: `activations`, `weights`, or `magnitude` of single
            channels (a control).
        refit: fits the output projection anew to the narrow heads.
        only: targets (`layers.0.attention.values@24`) to cut; nothing else is planned.
    """

    name: ClassVar[str] = "shrink_heads"
    needs: ClassVar[tuple[Any, ...]] = (head_sites, head_shapes, head_widths, cost)
    exactness: ClassVar[Exactness] = Exactness.APPROXIMATE
    fits: ClassVar[bool] = True

    shares: tuple[float, ...] = (0.75, 0.5, 0.25)
    multiple: int = 8
    basis: str = "activations"
    refit: bool = True
    only: tuple[str, ...] = ()

    def plan(self, program: Program, facts: Facts) -> Plan:
        """Plans one action a site, kind and width, the least predicted loss first."""
        self._check()
        shapes, sites = facts.get(head_shapes), facts.get(head_sites).found
        places = {f"{n}.{k}": (n, k) for n, own in shapes.kinds.items() for k in kinds_of(own)}
        named = [self._named(target, places, sites, shapes) for target in self.only]
        skips = () if self.only else tuple(Skip(RULE, *each) for each in shapes.skips)
        if not places:
            return Plan(skips=skips)
        found = facts.get(head_widths)
        wanted = named or [
            (label, kind, width)
            for label, kind in places.values()
            if kind != "heads" or is_fused(sites[label])
            for width in self._widths(found[label], kind, shapes.step(label, kind))
        ]
        plan = Plan.of(self._cut(facts, found[label], kind, w) for label, kind, w in wanted)
        actions = sorted(plan.actions, key=lambda action: action.loss or 0.0)
        return Plan(tuple(actions), skips + tuple(dict.fromkeys(plan.skips)))

    def _check(self) -> None:
        check_rungs(self.name, self.shares, self.multiple)
        check_word(self.name, "basis", self.basis, BASES)

    def _named(
        self, target: str, places: dict[str, tuple[str, str]], sites: Any, shapes: Shapes
    ) -> tuple[str, str, int]:
        name, _, text = target.rpartition("@")
        if name not in places:
            hint = nearest(name or target, places)
            raise UsageError(f"no heads are called '{name}'", place=self.name, hint=hint)
        label, kind = places[name]
        full = width_of(sites[label], kind)
        if not text.isdecimal() or not 1 <= int(text) < full:
            hint = f"give a width from 1 to {full - 1}"
            raise UsageError(f"heads of {full} channels cut to '{text}'", place=name, hint=hint)
        step = shapes.step(label, kind)
        if (full - int(text)) % step:
            hint = f"give a width that is {step} less than {full}, or {2 * step}, and so on"
            text = f"a width of {text}: rotary positions turn channels in pairs"
            raise UsageError(text, place=name, hint=hint)
        return label, kind, int(text)

    def _widths(self, found: HeadWidths, kind: str, step: int) -> Iterator[int]:
        full = width_of(found.site, kind)
        own = max(found.own(each, self.basis) for each in kinds_of((kind,), parts=True))
        rounded = {int(share * full) - int(share * full) % self.multiple for share in self.shares}
        ladder = {w - (full - w) % step for w in rounded if w >= 1}
        ladder = {width for width in ladder if 1 <= width < min(full, own)}
        yield from sorted(ladder | ({own} if own < full else set()), reverse=True)

    def _cut(self, facts: Facts, found: HeadWidths, kind: str, width: int) -> Action | Skip:
        label, site = found.site.label, found.site
        try:
            edits, loss = found.cut(kind, width, self.basis, refit=self.refit)
        except Unfit as reason:
            return Skip(RULE, f"{label}.{kind}", str(reason))
        full = width_of(site, kind)
        return Action(
            RULE,
            f"{label}.{kind}@{width}",
            edits,
            f"{kind} of {site.heads} heads from {full} to {width} channels",
            {"width": width, "left": width / full, "tokens": found.tokens},
            saving(facts.get(cost), site, kind, width, edits),
            loss,
            f"{label}/{place_of(site, kind)}",
        )


def place_of(site: HeadSite, kind: str) -> str:
    """Returns what the widths of a kind are rivals about."""
    return "head-width" if is_fused(site) else f"{kind}-width"


def is_fused(site: HeadSite) -> bool:
    """Whether some of queries, keys and values come from one linear, so that cuts are rivals."""
    return len({side.linear.node for side in site.sides.values()}) < len(site.sides)
