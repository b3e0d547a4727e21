"""Keeps low-rank latents of keys and values from call to call, not keys and values.

k = rotated(linear(x, Wk)); kept: [past, k]        kept: [past, down k]; scores: (up' q) (down k)
v = linear(x, Wv);          kept: [past, v]   ->   kept: [past, linear(x, down Wv)]
y = linear(attention(q, k, v), Wo)                 y = linear(attention(...), Wo up)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from redpass.analysis.caches.bases import BASES, Basis, key_basis, value_basis
from redpass.analysis.caches.edits import absorbed_values, projected_keys, rebuilt
from redpass.analysis.caches.ladders import (
    Ladder,
    check_ladder,
    check_word,
    label_of,
    ranks_of,
    saving,
)
from redpass.analysis.caches.moments import Moments, cache_moments
from redpass.analysis.caches.parts import is_fused
from redpass.analysis.caches.sites import NO_CACHE, CacheSide, cache_sites
from redpass.analysis.heads.axes import Unfit
from redpass.facts import Facts
from redpass.plan import Action, Edit, Exactness, Plan, Skip
from redpass.program import Program

RULE = "cache_latents"
KEYS = ("auto", "projected", "rebuilt")


@dataclass(frozen=True)
class CacheLatents:
    """Keeps fewer numbers a token of keys and values, whatever form of attention reads them.

    What: a latent for each group of heads, on the axes where the heads were. Of values, the way
    back goes behind the attention, into the output projection where that is smaller. Of keys, it
    goes to the queries (`projected`: the latent is of the keys as they are compared, rotated), or
    keys are rebuilt and rotated at their positions (`rebuilt`, as Palu does). Where nothing but
    moves stands between, both ends go into weights.
    When: never by itself. Each cache has a ladder of ranks; a budget or `only` decides.
    Not tried: a window of recent tokens kept in full (CSKV): it needs caches of two lengths.
    Costs: one calibration run; an eigenproblem a group. A recipe needs the same data again.
    Source: Palu (Chang et al. 2024, arXiv:2407.21118); CSKV (Wang et al. 2024, arXiv:2409.10593);
    latents of rotated keys: Loki (Singhania et al. 2024, arXiv:2406.02542).

    Attributes:
        shares: what is left of the numbers a token, a rung each.
        ranks: numbers a token and group in place of `shares`.
        multiple: ranks are rounded to multiples of this.
        group_size: key or value heads that share a latent; `rebuilt` keys gain from groups, the
            others pay for them with wider attention.
        keys: `projected`, `rebuilt`, or `auto`: projected where the attention is one op.
        basis: metric of the directions, one of `outputs`, `activations`, `weights`, `random`.
        refit: fit the way back by least squares on the calibration data.
        only: targets to plan, `layers.0.attention/keys@8`; nothing else is.
    """

    name: ClassVar[str] = "cache_latents"
    needs: ClassVar[tuple[Any, ...]] = (cache_sites,)
    exactness: ClassVar[Exactness] = Exactness.APPROXIMATE
    fits: ClassVar[bool] = True

    shares: tuple[float, ...] = (0.75, 0.5, 0.25)
    ranks: tuple[int, ...] = ()
    multiple: int = 8
    group_size: int = 1
    keys: str = "auto"
    basis: str = "outputs"
    refit: bool = True
    only: tuple[str, ...] = ()

    def plan(self, program: Program, facts: Facts) -> Plan:
        """Plans a ladder for the keys and one for the values of every attention."""
        sites = facts.get(cache_sites)
        check_word(self.name, "keys", self.keys, KEYS)
        check_word(self.name, "basis", self.basis, BASES)
        check_ladder(self._options, sites)
        if not program.signature.state:
            return Plan(skips=(Skip(RULE, "graph", NO_CACHE),))
        moments = cache_moments(program, facts, sites, self.group_size)
        found = [
            item
            for (label, kind), cache in sites.found.items()
            for item in self._ladder(label_of(label, kind), cache, moments.get((label, kind)))
        ]
        return Plan.of(item for item in found if self._is_wanted(item))

    @property
    def _options(self) -> Ladder:
        shown = (self.shares, self.ranks, self.multiple, self.group_size, self.only)
        return Ladder(self.name, *shown)

    def _is_wanted(self, item: Action | Skip) -> bool:
        return not self.only or item.target in self.only

    def _ladder(
        self, place: str, cache: CacheSide | str, moments: Moments | None
    ) -> Iterator[Action | Skip]:
        rule = f"{RULE}.{place.rpartition('/')[2]}"
        if isinstance(cache, str) or moments is None:
            yield Skip(rule, place, str(cache))
            return
        try:
            basis = self._basis(cache, moments)
            for rank in ranks_of(self._options, cache):
                yield self._rung(rule, place, cache, basis, rank)
        except Unfit as reason:
            yield Skip(rule, place, str(reason))

    def _is_rebuilt(self, cache: CacheSide) -> bool:
        if cache.side.kind == "value":
            return not is_fused(cache)
        return self.keys == "rebuilt" or (self.keys == "auto" and not is_fused(cache))

    def _basis(self, cache: CacheSide, moments: Moments) -> Basis:
        if cache.side.kind == "value":
            return value_basis(cache, moments, self.basis, refit=self.refit)
        back = self._is_rebuilt(cache)
        return key_basis(cache, moments, self.basis, rebuilt=back, refit=self.refit)

    def _rung(self, rule: str, place: str, cache: CacheSide, basis: Basis, rank: int) -> Action:
        factors, size = basis.factors(rank), self.group_size
        edits: tuple[Edit, ...]
        if self._is_rebuilt(cache):
            edits = rebuilt(cache, factors, size)
        elif cache.side.kind == "value":
            edits = absorbed_values(cache, factors, size)
        else:
            edits = projected_keys(cache, factors, size)
        full, loss = cache.width * size, basis.loss(factors)
        return Action(
            rule,
            f"{place}@{rank}",
            edits,
            f"{rank} of {full} numbers a token are kept for each of {factors.groups} groups of "
            f"{size} heads: {100 * loss:.3g}% of the stream is off",
            {"rank": rank, "width": full, "groups": factors.groups},
            saving(cache, factors, edits),
            loss,
            place,
        )
