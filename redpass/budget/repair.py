"""Repairs: passes that make a reduced program better and save nothing; kept when they do."""

from __future__ import annotations

import time

from redpass.budget.accounting import cost_record
from redpass.budget.quality import Quality, measure, worse_by
from redpass.budget.spec import Budget, worst_case
from redpass.engine import Check, Engine
from redpass.errors import RedpassError
from redpass.passes.spec import format_pass
from redpass.plan import Exactness, Pass
from redpass.program import Program
from redpass.record import CostRecord
from redpass.verify.originals import Originals


def is_repair(pass_: Pass) -> bool:
    """Whether a pass repairs what others did, so that it is judged by quality."""
    return pass_.exactness is Exactness.APPROXIMATE and bool(getattr(pass_, "repairs", False))


def repair(
    engine: Engine, budget: Budget, pass_: Pass, choosing: Originals, start: CostRecord
) -> bool:
    """Plans a repair, measures with and without it, and adopts it when it is better.

    Better is the metric of the first limit on the choosing data, with no limit missed that was
    held and no cost goal that was reached. Returns whether it was adopted.

    Args:
        start: what the loaded model costs; goals are relative to it.
    """
    started, nodes = time.perf_counter(), len(engine.program.graph.nodes)
    plan = engine.plan(pass_)
    todo = engine.permitted(pass_, plan.actions)
    kept, why = False, "nothing was planned"
    if todo:
        before = measure(budget, engine.program, choosing, "choosing")
        program, check = engine.trial(pass_, todo)
        kept, why = check.passed, check.reason
        if kept and _loses_goal(budget, start, engine.program, program):
            kept, why = False, "with what it costs the cost goal is not reached any more"
        elif kept:
            try:
                kept, why = _compare(budget, before, measure(budget, program, choosing, "choosing"))
            except RedpassError as error:
                kept, why = False, str(error)
        if kept:
            engine.adopt(program, [pass_], todo, Check("checked", why))
            engine.recipe.append((format_pass(pass_), [action.key for action in todo]))
    for action in todo:
        engine.applied += kept
        engine.note(pass_, action, "applied" if kept else "refused", why)
    engine.note_skips(pass_, plan)
    check = Check("checked" if todo else "nothing to do", why)
    count = len(todo) if kept else 0
    engine.note_pass(pass_, count, len(plan.skips), check, nodes, started)
    return kept


def _loses_goal(budget: Budget, start: CostRecord, before: Program, after: Program) -> bool:
    reached, left = (
        budget.reached(start, cost_record(program, start.sizes)) for program in (before, after)
    )
    return reached and not left


def _compare(budget: Budget, before: Quality, after: Quality) -> tuple[bool, str]:
    old, new = (found[budget.limits[0].metric] for found in (before, after))
    figures = f"{new.metric} {old.value:.5g} without, {new.value:.5g} with it on choosing data"
    if not worse_by(new) < worse_by(old):
        return False, f"no better: {figures}"
    miss = worst_case(after, budget, 0.0)
    if miss and not worst_case(before, budget, 0.0):
        return False, miss
    return True, figures
