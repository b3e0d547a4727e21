"""Merges key and value heads after turning them to look alike: fewer for the same queries.

k = cat(past 8 heads, ...)                k = cat(past 4 heads, ...)
v = cat(past 8 heads, ...)          ->    v = cat(past 4 heads, ...)
y = sdpa(q 8 heads, k, v)                 y = sdpa(q' 8 heads, k repeated, v repeated)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from redpass.analysis import cost, structure
from redpass.analysis.heads.alignment import head_moments
from redpass.analysis.heads.fits import HeadFits
from redpass.analysis.heads.ladders import Offers, merge_offers
from redpass.analysis.heads.sites import HeadSite, head_sites
from redpass.facts import Facts
from redpass.passes.heads import ladders
from redpass.plan import Exactness, Plan
from redpass.program import Program

RULE = "merge_key_value_heads.aligned"


@dataclass(frozen=True)
class MergeKeyValueHeads:
    """Makes multi-head attention grouped, or grouped attention with fewer key and value heads.

    What: per layer a ladder of counts that divide the key heads. Keys and values of each cluster
    are turned towards its first head by orthogonal matrices, which queries and the output
    projection take back, and replaced by their means; queries are put in order of the clusters.
    Both caches shrink. The output projection is fitted anew.
    When: never by itself. Keys are turned freely without rotary embedding, in the rotated planes
    with it, and not at all behind norms of heads (`redpass.analysis.heads.alignment`); values
    always freely. Heads equal up to such turns lose nothing.
    Not tried: numbers of heads that do not divide, so a configuration can say the result; key and
    value heads that queries read in different ways; training after, which the source needs.
    Costs: two runs over the calibration data, and of each rung one more through its attention.
    Source: see `redpass.analysis.heads.alignment`.

    Attributes:
        shares: what is left of the key heads, the ladder.
        align: False merges heads as they are: a control.
        refit: whether output projections are fitted anew.
        only: `layers.0.attention@2` (key heads) or labels; nothing else is planned.
    """

    name: ClassVar[str] = "merge_key_value_heads"
    needs: ClassVar[tuple[Any, ...]] = (structure, cost, head_sites, head_moments)
    exactness: ClassVar[Exactness] = Exactness.APPROXIMATE
    fits: ClassVar[bool] = True

    shares: tuple[float, ...] = (0.5, 0.25)
    align: bool = True
    refit: bool = True
    only: tuple[str, ...] = ()

    def plan(self, program: Program, facts: Facts) -> Plan:
        """Plans one action a layer and count of key heads, the least predicted loss first."""
        del program

        def offer(site: HeadSite, counts: tuple[int, ...], fits: HeadFits) -> Offers:
            moments = facts.get(head_moments)[site.label]
            return merge_offers(site, moments, self.shares, counts, fits, self.align)

        return ladders(RULE, facts, self.shares, self.only, refit=self.refit, offer=offer)
