"""Lets attention heads that look at the same tokens share queries and keys.

q = view(linear(x, w_q), 8 heads)         q = view(linear(x, w_q'), 5 heads)
k = cat(past 8 heads, ...)          ->    k = cat(past 5 heads, ...)
y = sdpa(q, k, v)                         y = sdpa(q[0, 1, 1, 2, ...], k[0, 1, 1, 2, ...], v)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from redpass.analysis import cost, structure
from redpass.analysis.heads.fits import HeadFits
from redpass.analysis.heads.ladders import Offers, cluster_offers
from redpass.analysis.heads.layouts import LAYOUTS
from redpass.analysis.heads.similarity import head_similarity, is_measurable
from redpass.analysis.heads.sites import HeadSite, head_sites
from redpass.analysis.rungs import check_word
from redpass.facts import Facts
from redpass.passes.heads import ladders
from redpass.plan import Exactness, Plan
from redpass.program import Program

RULE = "cluster_heads.alike"


@dataclass(frozen=True)
class ClusterHeads:
    """Lets heads whose attention probabilities are alike share one query and key head.

    What: per layer a ladder of cluster counts. `W_q` and `W_k` keep the rows of the
    representatives, the K cache their heads only. Every head keeps its own value, repeated scores
    being gathered or values put side by side (`layout`, see `redpass.analysis.heads.layouts`).
    Heads of a cluster that read one value head are merged: their outputs are equal. The output
    projection is fitted anew. Masks with a place for each head follow.
    When: never by itself. Multi-head, grouped and multi-query attention, fused or spelled out,
    with rotary embedding, norms of single heads and biases, causal or not, with a cache or
    without. Equal heads are a rung that loses nothing.
    Not tried: attention behind a norm over all heads, a gate, weights with a place for each head,
    values that something else reads; clusters that depend on the input.
    Costs: two runs over the calibration data, and of each rung one more through its attention.
    Source: CHAI (Agarwal et al. 2024, arXiv:2403.08058), here fixed for all inputs, and with
    distances that count what a head makes of its probabilities.

    Attributes:
        shares: what is left of the heads, the ladder; the elbow of the error is added.
        layout: `gather`, `wide` (scores once a cluster in any runtime) or `auto`.
        refit: whether output projections are fitted anew.
        only: `layers.0.attention@4` or labels; nothing else is planned.
    """

    name: ClassVar[str] = "cluster_heads"
    needs: ClassVar[tuple[Any, ...]] = (structure, cost, head_sites, head_similarity)
    exactness: ClassVar[Exactness] = Exactness.APPROXIMATE
    fits: ClassVar[bool] = True

    shares: tuple[float, ...] = (0.75, 0.5, 0.25)
    layout: str = "auto"
    refit: bool = True
    only: tuple[str, ...] = ()

    def plan(self, program: Program, facts: Facts) -> Plan:
        """Plans one action a layer and count of clusters, the least predicted loss first."""
        del program
        check_word(self.name, "layout", self.layout, LAYOUTS)

        def offer(site: HeadSite, counts: tuple[int, ...], _: HeadFits) -> Offers:
            if not is_measurable(site):
                return dict.fromkeys(counts or (1,), "the scale of its scores is no constant")
            costs = facts.get(head_similarity)[site.label].distances
            return cluster_offers(site, costs, self.shares, counts, self.layout)

        return ladders(RULE, facts, self.shares, self.only, refit=self.refit, offer=offer)
