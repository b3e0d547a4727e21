"""Keeps only some channels of the keys from call to call, and compares those.

k = rotated(linear(x, Wk)); kept: [past, k]   ->   kept: [past, k[channels]]
scores: q k                                        scores: q[channels] k[channels]
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from redpass.analysis.caches.channels import ORDERS, kept_channels
from redpass.analysis.caches.edits import projected_keys
from redpass.analysis.caches.ladders import (
    Ladder,
    check_ladder,
    check_word,
    label_of,
    ranks_of,
    saving,
)
from redpass.analysis.caches.moments import Moments, cache_moments
from redpass.analysis.caches.sites import NO_CACHE, CacheSide, cache_sites
from redpass.analysis.heads.axes import Unfit
from redpass.facts import Facts
from redpass.plan import Action, Exactness, Plan, Skip
from redpass.program import Program

RULE = "drop_key_channels.keys"


@dataclass(frozen=True)
class DropKeyChannels:
    """Drops the channels of each key head that move scores least.

    What: channels are picked from the keys as they are compared, rotated where they are, so any
    may go, not only rotary pairs; queries lose the same ones and scores keep their scale. Where
    nothing but moves stands between, the rows of both projections go, too.
    When: never by itself. The keys of each attention have a ladder; a budget or `only` decides.
    Not tried: other channels for each prompt, as ThinK picks them; values (see `cache_latents`).
    Costs: one calibration run. A recipe needs the same data again.
    Source: ThinK (Xu et al. 2024, arXiv:2407.21018): the product of the norms of a channel's
    queries and keys; here over calibration tokens.

    Attributes:
        shares: what is left of a head's channels, a rung each.
        ranks: channels a head in place of `shares`.
        multiple: channels are rounded to multiples of this.
        order: `product` of the norms of queries and keys; `keys` alone; `random`, a control.
        refit: let the channels that stay stand for those that go, by least squares.
        only: targets to plan, `layers.0.attention/keys@8`; nothing else is.
    """

    name: ClassVar[str] = "drop_key_channels"
    needs: ClassVar[tuple[Any, ...]] = (cache_sites,)
    exactness: ClassVar[Exactness] = Exactness.APPROXIMATE
    fits: ClassVar[bool] = True

    shares: tuple[float, ...] = (0.75, 0.5, 0.25)
    ranks: tuple[int, ...] = ()
    multiple: int = 8
    order: str = "product"
    refit: bool = True
    only: tuple[str, ...] = ()

    def plan(self, program: Program, facts: Facts) -> Plan:
        """Plans a ladder for the keys of every attention."""
        sites = facts.get(cache_sites)
        check_word(self.name, "order", self.order, ORDERS)
        check_ladder(self._options, sites)
        if not program.signature.state:
            return Plan(skips=(Skip(RULE, "graph", NO_CACHE),))
        moments = cache_moments(program, facts, sites, 1)
        found = (
            item
            for (label, kind), cache in sites.found.items()
            if kind == "key"
            for item in self._ladder(label_of(label, kind), cache, moments.get((label, kind)))
        )
        return Plan.of(item for item in found if not self.only or item.target in self.only)

    @property
    def _options(self) -> Ladder:
        return Ladder(self.name, self.shares, self.ranks, self.multiple, 1, self.only)

    def _ladder(
        self, place: str, cache: CacheSide | str, moments: Moments | None
    ) -> Iterator[Action | Skip]:
        if isinstance(cache, str) or moments is None:
            yield Skip(RULE, place, str(cache))
            return
        try:
            for count in ranks_of(self._options, cache):
                yield self._rung(place, cache, moments, count)
        except Unfit as reason:
            yield Skip(RULE, place, str(reason))

    def _rung(self, place: str, cache: CacheSide, moments: Moments, count: int) -> Action:
        factors, loss = kept_channels(cache, moments, count, self.order, refit=self.refit)
        edits = projected_keys(cache, factors, 1)
        return Action(
            RULE,
            f"{place}@{count}",
            edits,
            f"{count} of {cache.width} channels of each key head are kept: "
            f"{100 * loss:.3g}% of the stream is off",
            {"channels": count, "width": cache.width, "heads": cache.heads},
            saving(cache, factors, edits),
            loss,
            place,
        )
