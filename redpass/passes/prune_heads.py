"""Removes attention heads that add little to the residual stream.

q = view(linear(x, w_q), 8 heads)         q = view(linear(x, w_q'), 6 heads)
k = cat(past 4 heads, ...)          ->    k = cat(past 3 heads, ...)
linear(merge(sdpa(q, k, v)), w_o)         linear(merge(sdpa(q, k, v)), w_o')
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from redpass.analysis import cost, structure
from redpass.analysis.heads.contributions import head_contributions
from redpass.analysis.heads.fits import HeadFits
from redpass.analysis.heads.ladders import Offers, prune_offers
from redpass.analysis.heads.sites import HeadSite, head_sites
from redpass.facts import Facts
from redpass.passes.heads import ladders
from redpass.plan import Exactness, Plan
from redpass.program import Program

RULE = "prune_heads.contribution"


@dataclass(frozen=True)
class PruneHeads:
    """Cuts whole heads out of queries, keys, values and the output projection.

    What: per layer a ladder of counts. The heads with the least expected squared contribution go;
    rows of `W_q`, columns of `W_o`, and, where no head reads them any more, key and value heads
    with their cache. What stays keeps its weights, but for the output projection, which is fitted
    anew.
    When: never by itself. Under grouped attention every key head that stays keeps equally many
    query heads (so a configuration can say it), and whole key heads go where that loses no more.
    Heads that add nothing are a rung that loses nothing.
    Not tried: attention behind a norm over all heads, a gate, weights with a place for each head;
    pruning all heads (`drop_branches`).
    Costs: one run over the calibration data, and of each rung one more through its attention.
    Source: Michel et al. 2019, arXiv:1905.10650; FLAP (An et al. 2024, arXiv:2312.11983).

    Attributes:
        shares: what is left of the heads, the ladder.
        refit: whether output projections are fitted anew.
        only: `layers.0.attention@4` or labels; nothing else is planned.
    """

    name: ClassVar[str] = "prune_heads"
    needs: ClassVar[tuple[Any, ...]] = (structure, cost, head_sites, head_contributions)
    exactness: ClassVar[Exactness] = Exactness.APPROXIMATE
    fits: ClassVar[bool] = True

    shares: tuple[float, ...] = (0.75, 0.5, 0.25)
    refit: bool = True
    only: tuple[str, ...] = ()

    def plan(self, program: Program, facts: Facts) -> Plan:
        """Plans one action a layer and count of heads, the least predicted loss first."""
        del program

        def offer(site: HeadSite, counts: tuple[int, ...], _: HeadFits) -> Offers:
            scores = facts.get(head_contributions)[site.label]
            return prune_offers(site, scores, self.shares, counts)

        return ladders(RULE, facts, self.shares, self.only, refit=self.refit, offer=offer)
