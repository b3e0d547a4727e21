"""Keeps low-rank latents of keys and values from call to call, not keys and values.

k = rotated(linear(x, Wk)); kept: [past, k]        kept: [past, down k]; scores: (up' q) (down k)
v = linear(x, Wv);          kept: [past, v]   ->   kept: [past, linear(x, down Wv)]
y = linear(attention(q, k, v), Wo)                 y = linear(attention(...), Wo up)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from redpass.analysis.caches.bases import BASES, Basis, key_basis, value_basis
from redpass.analysis.caches.edits import absorbed_values, projected_keys, rebuilt
from redpass.analysis.caches.ladders import Ladder
from redpass.analysis.caches.moments import Moments
from redpass.analysis.caches.parts import Factors, is_fused
from redpass.analysis.caches.sites import CacheSide, cache_sites
from redpass.analysis.rungs import check_word
from redpass.facts import Facts
from redpass.passes.caches import Rung, ladders
from redpass.plan import Edit, Exactness, Plan
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
        del program
        check_word(self.name, "form of keys", self.keys, KEYS)
        check_word(self.name, "basis", self.basis, BASES)
        shown = (self.shares, self.ranks, self.multiple, self.group_size, self.only)
        return ladders(RULE, facts, Ladder(self.name, *shown), ("key", "value"), self._start)

    def _is_rebuilt(self, cache: CacheSide) -> bool:
        if cache.side.kind == "value":
            return not is_fused(cache)
        return self.keys == "rebuilt" or (self.keys == "auto" and not is_fused(cache))

    def _basis(self, cache: CacheSide, moments: Moments) -> Basis:
        if cache.side.kind == "value":
            return value_basis(cache, moments, self.basis, refit=self.refit)
        back = self._is_rebuilt(cache)
        return key_basis(cache, moments, self.basis, rebuilt=back, refit=self.refit)

    def _start(self, cache: CacheSide, moments: Moments) -> Callable[[int], Rung]:
        basis, size = self._basis(cache, moments), self.group_size
        full = cache.width * size

        def rung(rank: int) -> Rung:
            factors = basis.factors(rank)
            words = (
                f"{rank} of {full} numbers a token are kept for each of {factors.groups} groups of "
                f"{size} heads"
            )
            evidence = {"rank": rank, "width": full, "groups": factors.groups}
            return factors, self._edits(cache, factors), basis.loss(factors), words, evidence

        return rung

    def _edits(self, cache: CacheSide, factors: Factors) -> tuple[Edit, ...]:
        if self._is_rebuilt(cache):
            return rebuilt(cache, factors, self.group_size)
        if cache.side.kind == "value":
            return absorbed_values(cache, factors, self.group_size)
        return projected_keys(cache, factors, self.group_size)
