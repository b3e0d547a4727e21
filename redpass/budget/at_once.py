"""Taking many candidates of a given order at once, as deep as limits allow and goals need."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from redpass.budget.accounting import cost_record
from redpass.budget.candidates import Candidate
from redpass.budget.quality import Judge, Quality, figures
from redpass.budget.spec import CONFIDENCE, worst_case
from redpass.budget.stack import Stack
from redpass.budget.trials import Trials
from redpass.engine import Engine, first_bad
from redpass.record import CostRecord

RIVAL = "another cut of the same place was taken"


@dataclass(frozen=True)
class AtOnce:
    """What was taken, how good it is on the choosing data, and what became of each candidate."""

    accepted: Sequence[Candidate]
    quality: Quality = field(default_factory=dict)
    outcomes: Mapping[Candidate, tuple[str, str]] = field(default_factory=dict)


def take_at_once(
    engine: Engine, trials: Trials, judge: Judge, before: CostRecord, order: Sequence[Candidate]
) -> AtOnce:
    """Accepts the first candidates of an order: as many as hold all limits with the usual margin.

    How many is found by bisection, so a handful of counts is measured whatever the order's length.

    Args:
        trials: what accepts them; candidates that do not go together are in `trials.out` then.
        judge: measures on the choosing data.
        before: what the original costs; goals are relative to it.
    """
    stack, found = Stack(trials, order), dict[int, Quality]()
    enough = _enough(stack, engine, judge, before)

    def is_good(count: int) -> bool:
        found[count] = judge.measure(stack.program(count))
        return not worst_case(found[count], judge.budget, CONFIDENCE)

    count = stack.last_good(is_good, enough)
    stack.take(count)
    chosen, outcomes = stack.chosen(count), dict[Candidate, tuple[str, str]]()
    for number, candidate in enumerate(stack.order, 1):
        if candidate in chosen:
            outcomes[candidate] = "applied", f"{len(chosen)} at once: {figures(found[count])}"
        elif number <= count:
            outcomes[candidate] = "refused", RIVAL
        elif number <= enough:
            first = min(n for n in found if n > count)
            miss = worst_case(found[first], judge.budget, CONFIDENCE)
            outcomes[candidate] = "refused", f"{first} at once: {miss}"
        else:
            outcomes[candidate] = _beyond(engine, len(chosen))
    return AtOnce(chosen, found.get(count, {}), outcomes)


def _enough(stack: Stack, engine: Engine, judge: Judge, before: CostRecord) -> int:
    """How many of the first candidates reach the goals, or all; no more than permitted."""
    total, limit = len(stack.order), engine.settings.limit
    if limit is not None:
        room = max(0, limit - engine.applied)
        total = max(n for n in range(total + 1) if len(stack.chosen(n)) <= room)

    def is_reached(count: int) -> bool:
        return judge.budget.reached(before, cost_record(stack.program(count), before.sizes))

    return first_bad(total, is_reached) if total and is_reached(total) else total


def _beyond(engine: Engine, taken: int) -> tuple[str, str]:
    limit = engine.settings.limit
    if limit is not None and engine.applied + taken >= limit:
        return "beyond limit", f"REDPASS_LIMIT={limit}"
    return "refused", "not needed: the cost goal was reached before it"
