"""Choosing among candidate actions of an approximate pass, on measured quality.

Greedy and verified: candidates in the order of their predicted loss; each is added to what was
accepted, the whole model is measured on the choosing data, and the candidate stays only if every
limit holds with a margin (one-sided 95%). The reporting data are not touched here.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from redpass.budget.accounting import cost_record
from redpass.budget.spec import CONFIDENCE, Budget, worst_case
from redpass.engine import Check, Engine
from redpass.errors import RedpassError
from redpass.passes.spec import format_pass
from redpass.plan import Action, Pass
from redpass.program import Program
from redpass.progress import track
from redpass.record import CostRecord, QualityRecord
from redpass.verify.estimate import Estimate
from redpass.verify.metrics import evaluate_all, find_metric
from redpass.verify.originals import Originals


@dataclass
class Search:
    """One search over the candidates of one pass.

    Args:
        before: what the original costs; goals are relative to it.
        choosing: the original's outputs on the data that decide.
    """

    engine: Engine
    budget: Budget
    before: CostRecord
    choosing: Originals

    def run(self, pass_: Pass) -> list[Action]:
        """Plans, tries every candidate, adopts what was accepted and returns it."""
        started = time.perf_counter()
        plan = self.engine.plan(pass_)
        nodes = len(self.engine.program.graph.nodes)
        self.accepted: list[Action] = []
        self.base = self.current = self.engine.program
        stage = f"trying {len(plan.actions)} candidates of {pass_.name}"
        for action in track(plan.actions, self.engine.listener, stage, len(plan.actions)):
            self._consider(pass_, action)
        check = Check(
            "checked", f"{len(self.accepted)} of {len(plan.actions)} candidates within budget"
        )
        if self.accepted:
            only = tuple(action.target for action in self.accepted)
            resolved = type(pass_)(only=only)  # type: ignore[call-arg]
            self.engine.adopt(self.current, resolved, self.accepted, check)
            keys = [action.key for action in self.accepted]
            self.engine.recipe.append((format_pass(resolved), keys))
        self.engine.note_skips(pass_, plan)
        self.engine.note_pass(pass_, len(self.accepted), len(plan.skips), check, nodes, started)
        return self.accepted

    def _consider(self, pass_: Pass, action: Action) -> None:
        outcome, why = self._obstacle(pass_, action)
        if not outcome:
            outcome, why = self._try(pass_, action)
        if outcome == "applied":
            self.engine.applied += 1
            self.engine.listener.message(f"accepted {action.key}: {why}")
        self.engine.note(pass_, action, outcome, why)

    def _obstacle(self, pass_: Pass, action: Action) -> tuple[str, str]:
        """Returns an outcome and why when the action is not even to be tried."""
        settings = self.engine.settings
        if {action.key, pass_.name} & set(settings.skip):
            return "skipped by user", "named in REDPASS_SKIP"
        if settings.limit is not None and self.engine.applied >= settings.limit:
            return "beyond limit", f"REDPASS_LIMIT={settings.limit}"
        if self.accepted and self.budget.goals:
            now = cost_record(self.current, self.before.sizes)
            if self.budget.reached(self.before, now):
                return "refused", "not needed: the cost goal was reached before it"
        return "", ""

    def _try(self, pass_: Pass, action: Action) -> tuple[str, str]:
        trial, check = self.engine.trial(pass_, [*self.accepted, action])
        if not check.passed:
            return "rolled back", check.reason
        try:
            quality = measure(self.budget, trial, self.choosing, "choosing")
            miss = worst_case(quality, self.budget, CONFIDENCE)
        except RedpassError as error:
            return "rolled back", str(error)
        if miss:
            return "refused", miss
        self.accepted.append(action)
        self.current = trial
        figures = ", ".join(f"{r.metric} {r.value:.5g} ± {r.stderr:.2g}" for r in quality.values())
        return "applied", f"{figures} on choosing data"


def measure(
    budget: Budget, program: Program, originals: Originals, split: str
) -> dict[str, QualityRecord]:
    """Measures every limit's metric on the data of `originals`.

    Returns:
        Metric name -> record.
    """
    metrics = {limit.metric: find_metric(limit.metric) for limit in budget.limits}
    found = evaluate_all(
        list(metrics.values()),
        program,
        originals.program,
        originals.batches,
        originals=originals,
    )
    return {
        limit.metric: _quality(
            found[metrics[limit.metric].name],
            metrics[limit.metric].better,
            str(limit),
            limit.metric,
            split,
        )
        for limit in budget.limits
    }


def _quality(estimate: Estimate, better: str, limit: str, name: str, split: str) -> QualityRecord:
    return QualityRecord(
        metric=name,
        split=split,
        better=better,
        original=estimate.original,
        value=estimate.value,
        difference=estimate.difference,
        stderr=estimate.difference_stderr,
        count=estimate.count,
        limit=limit,
    )
