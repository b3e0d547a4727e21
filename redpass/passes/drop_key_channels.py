"""Keeps only some channels of the keys from call to call, and compares those.

k = rotated(linear(x, Wk)); kept: [past, k]   ->   kept: [past, k[channels]]
scores: q k                                        scores: q[channels] k[channels]
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from redpass.analysis.caches.channels import ORDERS, kept_channels
from redpass.analysis.caches.edits import projected_keys
from redpass.analysis.caches.ladders import Ladder
from redpass.analysis.caches.moments import Moments
from redpass.analysis.caches.sites import CacheSide, cache_sites
from redpass.analysis.rungs import check_word
from redpass.facts import Facts
from redpass.passes.caches import Rung, ladders
from redpass.plan import Exactness, Plan
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
        del program
        check_word(self.name, "order", self.order, ORDERS)
        options = Ladder(self.name, self.shares, self.ranks, self.multiple, 1, self.only)
        return ladders(RULE, facts, options, ("key",), self._start)

    def _start(self, cache: CacheSide, moments: Moments) -> Callable[[int], Rung]:
        def rung(count: int) -> Rung:
            factors, loss = kept_channels(cache, moments, count, self.order, refit=self.refit)
            words = f"{count} of {cache.width} channels of each key head are kept"
            evidence = {"channels": count, "width": cache.width, "heads": cache.heads}
            return factors, projected_keys(cache, factors, 1), loss, words, evidence

        return rung
