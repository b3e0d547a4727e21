"""What the passes over caches share: which caches, their rungs, their actions.

Not a pass itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from redpass.analysis.caches.ladders import Ladder, label_of, ranks_of, saving, wanted_ranks
from redpass.analysis.caches.moments import Moments, cache_moments
from redpass.analysis.caches.parts import Factors
from redpass.analysis.caches.sites import NO_CACHE, CacheSide, cache_sites
from redpass.analysis.heads.axes import Unfit
from redpass.facts import Facts
from redpass.plan import Action, Edit, Plan, Skip

Rung = tuple[Factors, tuple[Edit, ...], float, str, Mapping[str, float]]
"""Factors, edits, predicted loss, words and evidence of one size of a cache."""

Start = Callable[[CacheSide, Moments], Callable[[int], Rung]]
"""Looks at a cache once; what it returns makes a rung of each size. Both may raise `Unfit`."""


def ladders(rule: str, facts: Facts, options: Ladder, kinds: Sequence[str], start: Start) -> Plan:
    """Returns the plan with a ladder for each cache of some kinds (`key`, `value`).

    Args:
        rule: of the keys' actions: `cache_latents.keys`.

    Raises:
        UsageError: sizes or targets that no cache has; before any data are read.
        DataError: no calibration data.
    """
    sites = facts.get(cache_sites)
    wanted = wanted_ranks(options, sites, kinds)
    if not facts.program.signature.state:
        return Plan(skips=(Skip(rule, "graph", NO_CACHE),))
    moments = cache_moments(facts.program, facts, sites, options.size)
    places = {label_of(*key): (key, cache) for key, cache in sites.found.items() if key[1] in kinds}
    return Plan.of(
        item
        for place, (key, cache) in places.items()
        if place in wanted or not wanted
        for item in _ladder(rule, options, place, cache, moments.get(key), start, wanted)
    )


def _ladder(
    rule: str, options: Ladder, place: str, cache: CacheSide | str, moments: Moments | None,
    start: Start, wanted: Mapping[str, Sequence[int]],
) -> Iterator[Action | Skip]:  # fmt: skip
    rule = f"{rule.partition('.')[0]}.{place.rpartition('/')[2]}"
    if isinstance(cache, str) or moments is None:
        yield Skip(rule, place, str(cache))
        return
    sizes = wanted.get(place) or ranks_of(options, cache)
    if not sizes:
        full = cache.width * options.size
        yield Skip(rule, place, f"no rank below {full} is a multiple of {options.multiple}")
    try:
        rung = start(cache, moments)
        for size in sizes:
            factors, edits, loss, words, evidence = rung(size)
            off = f"{words}: {100 * loss:.3g}% of the stream is off"
            gain = saving(cache, factors, edits)
            yield Action(rule, f"{place}@{size}", edits, off, evidence, gain, loss, place)
    except Unfit as reason:
        yield Skip(rule, place, str(reason))
