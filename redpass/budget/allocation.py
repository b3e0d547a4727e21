"""Allocation: in which order rungs of many ladders are climbed, so that each loss buys the most.

A ladder is the candidates of one place (`Action.place`): widths, ranks or counts that a layer may
be cut to, each with its saving and its predicted loss. Passes predict losses from statistics, each
family in its own way; one trial a ladder tells how much that place really matters, and scales all
its rungs. Then the steps along the lower convex hulls of all ladders are taken by slope: loss for
what is saved. Any number of first steps is the best allocation of what these steps save together
(up to the gaps between rungs), whatever families the ladders are of.

Source: reverse water-filling as in rate-distortion theory (Cover and Thomas, Elements of
Information Theory, 10.3.3), for discrete choices by the convex hull (Shoham and Gersho 1988).
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence

from redpass.budget.candidates import MOST, Candidate, predicted_saving
from redpass.budget.trials import Trials
from redpass.plan import Action
from redpass.progress import Listener, Silent, track
from redpass.record import CostRecord

CLIP = 8.0
"""A place counts at most this many times more, or less, than the middle one of its family: one
trial on few batches says no more."""

Worth = Callable[[Action], float]
"""Predicted share of the cost that an action saves."""


def ladders(pool: Iterable[Candidate]) -> dict[str, list[Candidate]]:
    """Returns the candidates by place; one without a place is a ladder of its own."""
    found: dict[str, list[Candidate]] = {}
    for candidate in pool:
        found.setdefault(candidate.place, []).append(candidate)
    return found


def measure_ladders(
    pool: Sequence[Candidate],
    attempt: Callable[[Candidate], bool],
    listener: Listener | None = None,
) -> dict[str, float]:
    """Tries one rung of each ladder, at most `MOST`; returns by what to multiply its losses.

    Ladders that were not tried, or whose trial failed, count as the middle one of their family.

    Args:
        attempt: tries a candidate alone and fills in its loss.
    """
    known = ladders(pool)
    step = -(-len(known) // MOST)
    ratios: dict[str, float] = {}
    tried = list(known)[::step]
    for place in track(tried, listener or Silent(), f"trying {len(tried)} places", len(tried)):
        rungs = sorted(known[place], key=lambda c: c.action.loss or 0.0)
        middle = rungs[len(rungs) // 2]
        if attempt(middle) and middle.action.loss:
            ratios[place] = middle.loss / middle.action.loss
    return _tempered(known, ratios)


def _tempered(
    known: Mapping[str, Sequence[Candidate]], ratios: Mapping[str, float]
) -> dict[str, float]:
    """Ratios no further than `CLIP` from the middle of their family: passes of one name."""
    families: dict[str, list[float]] = {}
    for place, ratio in ratios.items():
        families.setdefault(known[place][0].pass_.name, []).append(ratio)
    positive = [ratio for ratio in ratios.values() if ratio > 0]
    usual = statistics.median(positive) if positive else 1.0
    scales = {}
    for place, rungs in known.items():
        middle = statistics.median(families.get(rungs[0].pass_.name, [usual]))
        middle = middle if middle > 0 else usual
        ratio = ratios.get(place, middle)
        scales[place] = min(max(ratio, middle / CLIP), middle * CLIP)
    return scales


def allocate(
    pool: Sequence[Candidate], trials: Trials, before: CostRecord, listener: Listener
) -> list[Candidate]:
    """Tries one rung of each ladder and returns the order in which to take what is not out.

    Args:
        trials: tries candidates; its `costs` are what savings are counted in.
        before: what predicted savings are shares of.
    """
    scales = measure_ladders(pool, trials.attempt, listener)
    left = [candidate for candidate in pool if candidate not in trials.out]
    return allocated(left, lambda a: predicted_saving(a, before, trials.costs), scales)


def allocated(
    pool: Sequence[Candidate], worth: Worth, scales: Mapping[str, float] | None = None
) -> list[Candidate]:
    """Returns candidates in the order in which to take them; a later rung replaces an earlier one.

    Rungs above the convex hull of their ladder are left out: a mixture of others beats them.

    Args:
        scales: by what the predicted losses of a place are multiplied, 1 where it is not named.
    """
    steps: list[tuple[float, float, Candidate]] = []
    for place, rungs in ladders(pool).items():
        scale = (scales or {}).get(place, 1.0)
        points = [(worth(c.action), scale * (c.action.loss or 0.0), c) for c in rungs]
        steps += _hull([point for point in points if point[0] > 0])
    return [candidate for _, _, candidate in sorted(steps, key=lambda step: step[:2])]


def _hull(
    points: Iterable[tuple[float, float, Candidate]],
) -> list[tuple[float, float, Candidate]]:
    """Returns (slope of the step to it, saving, candidate) along the lower convex hull."""
    kept: list[tuple[float, float, Candidate]] = []
    for saving, loss, candidate in sorted(points, key=lambda point: point[:2]):
        if kept and saving <= kept[-1][0]:
            continue
        while kept and _slope(kept, saving, loss) <= _own_slope(kept):
            kept.pop()
        kept.append((saving, loss, candidate))
    return [(_own_slope(kept[: n + 1]), kept[n][0], kept[n][2]) for n in range(len(kept))]


def _slope(kept: Sequence[tuple[float, float, Candidate]], saving: float, loss: float) -> float:
    """Slope from the last point kept to a new one."""
    return (loss - kept[-1][1]) / (saving - kept[-1][0])


def _own_slope(kept: Sequence[tuple[float, float, Candidate]]) -> float:
    """Slope of the last point kept from the one before it, or from nothing."""
    before = kept[-2][:2] if len(kept) > 1 else (0.0, 0.0)
    return (kept[-1][1] - before[1]) / (kept[-1][0] - before[0])
