"""Keeps low-rank latents of keys and values from call to call, not keys and values.

k = rotated(linear(x, Wk)); kept: [past, k]        kept: [past, down k]; scores: (up' q) (down k)
v = linear(x, Wv);          kept: [past, v]   ->   kept: [past, linear(x, down Wv)]
y = linear(attention(q, k, v), Wo)                 y = linear(attention(...), Wo up)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from redpass.analysis.caches.bases import BASES, Basis, key_basis, value_basis
from redpass.analysis.caches.edits import absorbed_values, projected_keys, rebuilt
from redpass.analysis.caches.ladders import Ladder
from redpass.analysis.caches.moments import Moments
from redpass.analysis.caches.parts import Factors, is_fused
from redpass.analysis.caches.sites import CacheSide, cache_sites
from redpass.analysis.caches.windows import check_rows, check_window, windowed
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
    Window: with `window=32` keys and values of the latest 32 tokens are kept in full, too, in a
    state of their own; a query reads them there, and those further back by their latents (CSKV).
    That is a rule on pairs of tokens: how tokens are dealt out to calls changes nothing.
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
        window: latest tokens that are kept in full beside their latents; 0 for none. The data
            need rows of at least twice as many tokens, or latents would hardly be read.
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
    window: int = 0
    refit: bool = True
    only: tuple[str, ...] = ()

    def plan(self, program: Program, facts: Facts) -> Plan:
        """Plans a ladder for the keys and one for the values of every attention."""
        check_window(self.name, self.window)
        check_word(self.name, "form of keys", self.keys, KEYS)
        check_word(self.name, "basis", self.basis, BASES)
        if self.window:
            check_rows(program, facts.get(cache_sites), facts.data, self.window)
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
        found = key_basis(cache, moments, self.basis, rebuilt=back, refit=self.refit)
        # Beside keys in full, what all keys share moves attention.
        return replace(found, mean=moments.mean) if self.window and not back else found

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
            if self.window:
                words += f", and {self.window} tokens in full"
                evidence["window"] = self.window
            return factors, self._edits(cache, factors), basis.loss(factors), words, evidence

        return rung

    def _edits(self, cache: CacheSide, factors: Factors) -> tuple[Edit, ...]:
        if self.window:
            back = self._is_rebuilt(cache) and cache.side.kind == "key"
            return windowed(cache, factors, self.group_size, self.window, rebuilt=back)
        if self._is_rebuilt(cache):
            return rebuilt(cache, factors, self.group_size)
        if cache.side.kind == "value":
            return absorbed_values(cache, factors, self.group_size)
        return projected_keys(cache, factors, self.group_size)
