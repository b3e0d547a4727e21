"""What is settled before a run: which passes, in which groups, and whether it can end well."""

from __future__ import annotations

from collections.abc import Sequence

from redpass.budget.repair import is_repair
from redpass.budget.spec import Budget
from redpass.data import Splits
from redpass.errors import BudgetError, DataError, UsageError
from redpass.passes import REDUCE_ALIKE, default_pipeline
from redpass.passes.spec import as_passes
from redpass.plan import Exactness, Pass


def chosen_passes(
    passes: str | Sequence[Pass] | None,
    reduce: str | Sequence[Pass] | None,
    budget: Budget,
    *,
    alike: bool = False,
) -> tuple[Pass, ...]:
    """Returns the passes a run was asked for, parsed; the default pipeline for None.

    Args:
        reduce: approximate passes that take the place of the default pipeline's.
        alike: the default ones are those that leave all layers alike.

    Raises:
        UsageError: both are given, an exact pass in `reduce`, or what is no pass or option.
    """
    if passes is not None and reduce is not None:
        hint = "--passes is the whole list, --reduce a part of the default one: give one of them"
        raise UsageError("passes are given twice", place="--reduce", hint=hint)
    if passes is not None:
        return as_passes(passes)
    wanted = as_passes(reduce or ())
    for pass_ in wanted:
        if pass_.exactness is not Exactness.APPROXIMATE:
            hint = "the exact passes of the default pipeline run anyway"
            raise UsageError(f"'{pass_.name}' is exact", place="--reduce", hint=hint)
    usual = REDUCE_ALIKE if alike else ()
    return default_pipeline(approximate=bool(budget.limits or wanted), reduce=wanted or usual)


def preflight(passes: Sequence[Pass], budget: Budget, data: Splits | None) -> None:
    """Raises before any long work when the run cannot end well."""
    lossy = [pass_.name for pass_ in passes if pass_.exactness is Exactness.APPROXIMATE]
    if lossy and not budget.limits:
        raise BudgetError(
            "an approximate pass needs a quality budget",
            place=lossy[0],
            hint="e.g. --budget 'kl<=0.02' (or 'cosine>=0.98' for embeddings)",
        )
    if lossy and data is None:
        raise DataError(
            "an approximate pass needs data to measure on", place=lossy[0], hint="pass --data FILE"
        )


def grouped(passes: Sequence[Pass]) -> list[tuple[Pass, ...]]:
    """Returns exact passes and repairs alone, approximate ones in a row as one search."""
    groups: list[tuple[Pass, ...]] = []
    for pass_ in passes:
        if groups and all(_is_searched(each) for each in (pass_, groups[-1][0])):
            groups[-1] = (*groups[-1], pass_)
        else:
            groups.append((pass_,))
    return groups


def _is_searched(pass_: Pass) -> bool:
    return pass_.exactness is Exactness.APPROXIMATE and not is_repair(pass_)
