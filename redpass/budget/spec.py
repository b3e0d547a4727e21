"""Budget specs: `cosine>=0.98`, `perplexity<=+1%,flops<=-20%`.

A spec is a comma-separated list of bounds. A bound on a quality metric is a *limit*: it must hold
on data the search did not see. A bound on a cost is a *goal*: the search stops once it is reached,
and a run that does not reach it misses its budget. A value with a sign and `%` is relative to the
original model.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from redpass.errors import UsageError, nearest
from redpass.record import CostRecord, QualityRecord
from redpass.verify.directions import BETTER

COSTS = ("parameters", "flops", "bytes", "kv_bytes_per_token")
CONFIDENCE = 1.645 * math.sqrt(2)
"""The margin a choice must keep, in standard errors: the one-sided 95% quantile of the normal
distribution, for the difference of two samples, as the reporting data err as much as the choosing
data do."""

METHODS = ("greedy", "allocated", "one-shot")
"""How candidates are chosen; see `search`."""

_BOUND = re.compile(r"^\s*([\w.:]+)\s*(<=|>=)\s*([+-]?)(\d+(?:\.\d*)?(?:[eE][+-]?\d+)?)(%?)\s*$")


@dataclass(frozen=True)
class Limit:
    """A bound on a quality metric.

    Attributes:
        relation: `<=` or `>=`.
        value: the bound, or the allowed relative change (0.01 for `+1%`) when `relative`.
    """

    metric: str
    relation: str
    value: float
    relative: bool

    def bound(self, original: float) -> float:
        """Returns the bound as a value of the metric, given the original model's."""
        return original + abs(original) * self.value if self.relative else self.value

    def holds(self, quality: QualityRecord, margin: float = 0.0) -> bool:
        """Whether the measured value, made worse by `margin` standard errors, is in bounds."""
        error = quality.stderr if math.isfinite(quality.stderr) else math.inf
        slack = margin * error if margin else 0.0
        if self.relation == "<=":
            return quality.value + slack <= self.bound(quality.original)
        return quality.value - slack >= self.bound(quality.original)

    def __str__(self) -> str:
        return f"{self.metric}{self.relation}{_number(self.value, self.relative)}"


@dataclass(frozen=True)
class Goal:
    """A cost that must come down to `value`, or by the relative change `value` (-0.2 is `-20%`)."""

    cost: str
    value: float
    relative: bool

    def reached(self, before: CostRecord, after: CostRecord) -> bool:
        """Whether the cost of `after` is low enough."""
        start, now = float(getattr(before, self.cost)), float(getattr(after, self.cost))
        return now <= (start * (1 + self.value) if self.relative else self.value)

    def __str__(self) -> str:
        return f"{self.cost}<={_number(self.value, self.relative)}"


@dataclass(frozen=True)
class Budget:
    """All limits hold and all goals are reached, or the run missed."""

    limits: tuple[Limit, ...] = ()
    goals: tuple[Goal, ...] = ()

    def __str__(self) -> str:
        return ",".join(map(str, (*self.limits, *self.goals)))

    def reached(self, before: CostRecord, after: CostRecord) -> bool:
        """Whether there are goals and all of them are reached."""
        return bool(self.goals) and all(goal.reached(before, after) for goal in self.goals)


def parse_budget(text: str) -> Budget:
    """Parses a spec.

    Raises:
        UsageError: a bound that is not of the form `name<=value`, or an unknown name; the message
            names the nearest known one.
    """
    limits: list[Limit] = []
    goals: list[Goal] = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        found = _BOUND.match(part)
        if not found:
            raise UsageError(
                f"'{part}' is not a bound",
                place="--budget",
                hint="write e.g. 'cosine>=0.98', 'perplexity<=+1%', 'kl<=0.02', 'flops<=-20%'",
            )
        bound = _bound(part, found.groups())
        (goals if isinstance(bound, Goal) else limits).append(bound)  # type: ignore[arg-type]
    if goals and not limits:
        raise UsageError(
            "a cost goal needs a quality limit beside it",
            place="--budget",
            hint=f"e.g. '{goals[0]},kl<=0.05'",
        )
    return Budget(tuple(limits), tuple(goals))


def check_method(name: str) -> None:
    """Raises `UsageError` for a way of choosing that is not one of `METHODS`."""
    if name not in METHODS:
        hint = nearest(name, METHODS)
        raise UsageError(f"unknown search '{name}'", place="--search", hint=hint)


def _bound(part: str, groups: tuple[str, ...]) -> Limit | Goal:
    name, relation, sign, digits, percent = groups
    relative = bool(percent)
    value = float(digits) / (100 if percent else 1) * (-1 if sign == "-" else 1)
    if relative and not sign:
        raise UsageError(f"'{part}': write the sign, e.g. +1% or -20%", place="--budget")
    if name in COSTS:
        return _goal(part, name, relation, value, relative)
    if name not in BETTER and ":" not in name and "." not in name:
        hint = nearest(name, [*BETTER, *COSTS])
        raise UsageError(f"unknown metric '{name}'", place="--budget", hint=hint)
    wanted = ">=" if _better(name) == "higher" else "<="
    if relation != wanted:
        raise UsageError(f"'{part}': {name} is bounded with {wanted}", place="--budget")
    return Limit(name, relation, value, relative)


def _better(name: str) -> str:
    """Which way a metric is better; only one of the user's own takes PyTorch to tell."""
    if name in BETTER:
        return BETTER[name]
    from redpass.verify.metrics import find_metric

    return find_metric(name).better


def _goal(part: str, name: str, relation: str, value: float, relative: bool) -> Goal:
    if relation != "<=" or (relative and not -1 < value < 0):
        raise UsageError(
            f"'{part}': a cost goal is '{name}<=-20%' or '{name}<=VALUE'", place="--budget"
        )
    return Goal(name, value, relative)


def _number(value: float, relative: bool) -> str:
    return f"{value * 100:+g}%" if relative else f"{value:g}"


def worst_case(quality: Mapping[str, QualityRecord], budget: Budget, margin: float) -> str:
    """Returns the first limit that does not hold, with figures, or "" when all hold."""
    for limit in budget.limits:
        record = quality[limit.metric]
        if not limit.holds(record, margin):
            return (
                f"{limit.metric} {record.value:.5g} ± {record.stderr:.2g} on {record.split} data, "
                f"limit {limit} (original {record.original:.5g})"
            )
    return ""


def doubts(quality: Mapping[str, QualityRecord], budget: Budget) -> list[str]:
    """Returns a sentence for each limit that the data are too few to tell with confidence."""
    found = []
    for limit in budget.limits:
        record = quality[limit.metric]
        room = abs(limit.bound(record.original) - record.original)
        if CONFIDENCE / math.sqrt(2) * record.stderr > room:
            found.append(
                f"{record.count} samples of {record.split} data are too few to be sure of "
                f"{limit}: the standard error is {record.stderr:.2g}, the limit leaves {room:.2g}"
            )
    return found
