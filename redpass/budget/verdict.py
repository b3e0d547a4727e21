"""Whether a budget can hold, whether it held, and what broke it: on data that chose nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from redpass.budget.accounting import cost_record
from redpass.budget.quality import measure
from redpass.budget.spec import Budget, doubts, worst_case
from redpass.data import refuse_short_rows
from redpass.errors import BudgetError
from redpass.plan import Action
from redpass.program import Program
from redpass.record import CostRecord, QualityRecord
from redpass.rewrite import apply
from redpass.verify.metrics import find_metric
from redpass.verify.originals import Originals

Data = Callable[[str], Originals]
"""What the original says about a split, by the split's name."""


@dataclass(frozen=True)
class Verdict:
    """How a run ended.

    Attributes:
        state: `met`, `missed` or `no budget`.
        miss: what was missed, in words, or "".
        quality: each limit on the choosing and on the reporting data.
        doubts: limits that the data are too few to tell.
    """

    state: str
    miss: str = ""
    quality: tuple[QualityRecord, ...] = ()
    doubts: tuple[str, ...] = ()


def check_possible(budget: Budget, original: Program, data: Data) -> None:
    """Raises before any search when the data are too few or the untouched model misses.

    Raises:
        DataError: rows of less than two tokens, or data that a metric cannot be measured on.
        BudgetError: a limit that the original itself does not hold.
    """
    if original.origin.task == "causal-lm":
        for split in ("calibration", "choosing", "reporting"):
            refuse_short_rows(data(split).batches)
    for limit in budget.limits:
        for split in ("choosing", "reporting"):
            _check_metric(limit.metric, original, split, data(split))
    found = measure(budget, original, data("choosing"), "choosing")
    miss = worst_case(found, budget, 0.0)
    if miss:
        raise BudgetError(
            f"the original model itself misses the budget: {miss}", hint="loosen --budget"
        )


def _check_metric(metric: str, original: Program, split: str, originals: Originals) -> None:
    """Raises `DataError` where a metric cannot be measured on a split; recalled if it was."""
    name = f"check of {metric}, {split}, {len(originals.batches)} batches"
    originals.journal.recall(name, lambda: find_metric(metric).check(original, originals.batches))


def judge(budget: Budget, program: Program, before: CostRecord, data: Data | None) -> Verdict:
    """Measures the result; the reporting data decide.

    Args:
        before: what the original costs.
    """
    if not budget.limits or data is None:
        return Verdict("no budget")
    quality: list[QualityRecord] = []
    for split in ("choosing", "reporting"):
        found = measure(budget, program, data(split), split)
        miss = worst_case(found, budget, 0.0)
        quality += [replace(record, met=not miss) for record in found.values()]
    unsure = tuple(doubts(found, budget))
    if miss:
        miss = f"the quality budget does not hold: {miss}"
    else:
        miss = _missed_goal(budget, before, cost_record(program, before.sizes))
    return Verdict("missed" if miss else "met", miss, tuple(quality), unsure)


def _missed_goal(budget: Budget, before: CostRecord, after: CostRecord) -> str:
    for goal in budget.goals:
        if not goal.reached(before, after):
            now, start = getattr(after, goal.cost), getattr(before, goal.cost)
            share = 100 * (now / start - 1) if start else 0.0
            text = f"the cost goal {goal} was not reached within {budget.limits[0]}"
            return f"{text}: {goal.cost} changed by {share:+.1f}%"
    return ""


def guilty(
    budget: Budget, steps: Sequence[tuple[Program, Sequence[Action]]], reporting: Originals
) -> str | None:
    """Returns the accepted action without which, and all accepted after it, the budget holds.

    Args:
        steps: a program, and the actions accepted on it, in the order of the run.
    """
    for base, accepted in reversed(steps):
        for count in reversed(range(len(accepted))):
            trial = apply(base, accepted[:count])
            found = measure(budget, trial, reporting, "reporting")
            if not worst_case(found, budget, 0.0):
                return accepted[count].key
    return None
