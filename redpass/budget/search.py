"""Choosing among candidate actions of an approximate pass, on measured quality.

Each candidate is first measured alone, on a few calibration batches; one that misses the budget
already there is refused. The others are added to what was accepted, the least harmful first; each
time the whole model is measured on the choosing data, and the candidate stays only if every limit
holds with a margin (one-sided 95%). The reporting data are not touched here.

Greedy over measured loss, after SLEB (Song et al. 2024) and BlockPruner (Zhong et al. 2024), but
with one ranking at the start in place of one a step.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

from redpass.budget.accounting import cost_record
from redpass.budget.spec import CONFIDENCE, Budget, worst_case
from redpass.engine import Check, Engine
from redpass.errors import RedpassError
from redpass.passes.spec import format_pass
from redpass.plan import Action, Pass, Replace
from redpass.program import Program
from redpass.progress import track
from redpass.record import CostRecord, QualityRecord, from_json
from redpass.verify.estimate import Estimate
from redpass.verify.metrics import evaluate_all, find_metric
from redpass.verify.originals import Originals

HOPELESS = 3.0
"""A candidate that misses a limit by this many standard errors on a few batches is not measured
on the rest."""


@dataclass
class Search:
    """One search over the candidates of one pass.

    Args:
        before: what the original costs; goals are relative to it.
        screening: the original's outputs on a few calibration batches.
        first: its outputs on a few choosing batches, where hopeless candidates stop.
        choosing: its outputs on all the data that decide.
    """

    engine: Engine
    budget: Budget
    before: CostRecord
    screening: Originals
    first: Originals
    choosing: Originals

    def run(self, pass_: Pass) -> list[Action]:
        """Plans, tries every candidate, adopts what was accepted and returns it.

        Targets in `held` were not tried because they do not compose with an accepted action of
        the same plan; plan again on the new program to try them.
        """
        started = time.perf_counter()
        plan, self.facts = self.engine.plan(pass_), self.engine.facts
        nodes = len(self.engine.program.graph.nodes)
        self.accepted: list[Action] = []
        self.held: list[str] = []
        self.base = self.current = self.engine.program
        ranked = self._screen(pass_, plan.actions)
        stage = f"trying {len(ranked)} candidates of {pass_.name}"
        for action in track(ranked, self.engine.listener, stage, len(ranked)):
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

    def _screen(self, pass_: Pass, actions: Sequence[Action]) -> list[Action]:
        """Measures each candidate alone; drops the hopeless, sorts the others by measured loss."""
        limit, ranked = self.budget.limits[0], []
        stage = f"screening {len(actions)} candidates of {pass_.name}"
        for action in track(actions, self.engine.listener, stage, len(actions)):
            found, why = self._measure(pass_, [action], self.screening, "calibration")
            if not found:
                self.engine.note(pass_, action, "rolled back", why)
                continue
            record = found[limit.metric]
            loss = record.difference if record.better == "lower" else -record.difference
            judged = replace(
                action, loss=loss, evidence={**action.evidence, limit.metric: record.value}
            )
            miss = worst_case(found, self.budget, 0.0)
            if miss:
                self.engine.note(pass_, judged, "refused", f"alone already: {miss}")
            else:
                ranked.append(judged)
        return sorted(ranked, key=lambda action: action.loss or 0.0)

    def _measure(
        self, pass_: Pass, actions: Sequence[Action], originals: Originals, split: str
    ) -> tuple[dict[str, QualityRecord], str]:
        """Applies `actions` to the base and measures; on a failed check nothing, and why."""
        self.tried, check = self.engine.trial(pass_, actions)
        if not check.passed:
            return {}, check.reason
        try:
            return measure(self.budget, self.tried, originals, split), ""
        except RedpassError as error:
            return {}, str(error)

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
        rival = self._rival(action)
        if rival:
            self.held.append(action.target)
            return "refused", f"for now: it shares a sum with {rival}, which was accepted before it"
        if settings.limit is not None and self.engine.applied >= settings.limit:
            return "beyond limit", f"REDPASS_LIMIT={settings.limit}"
        if self.accepted and self.budget.goals:
            now = cost_record(self.current, self.before.sizes)
            if self.budget.reached(self.before, now):
                return "refused", "not needed: the cost goal was reached before it"
        return "", ""

    def _rival(self, action: Action) -> str:
        """The accepted action that replaces the same value, as parallel branches' do.

        Two such actions planned on one graph do not compose: each leaves the other's operand.
        """
        mine = {edit.old for edit in action.edits if isinstance(edit, Replace)}
        for other in self.accepted:
            if mine & {edit.old for edit in other.edits if isinstance(edit, Replace)}:
                return other.target
        return ""

    def _try(self, pass_: Pass, action: Action) -> tuple[str, str]:
        trial = [*self.accepted, action]
        first, why = self._measure(pass_, trial, self.first, "choosing")
        hopeless = worst_case(first, self.budget, -HOPELESS) if first else why
        if hopeless:
            return ("refused" if first else "rolled back"), f"on the first batches: {hopeless}"
        quality, why = self._measure(pass_, trial, self.choosing, "choosing")
        if not quality:
            return "rolled back", why
        miss = worst_case(quality, self.budget, CONFIDENCE)
        if miss:
            return "refused", miss
        self.accepted.append(action)
        self.current = self.tried
        figures = ", ".join(f"{r.metric} {r.value:.5g} ± {r.stderr:.2g}" for r in quality.values())
        return "applied", f"{figures} on choosing data"


def measure(
    budget: Budget, program: Program, originals: Originals, split: str
) -> dict[str, QualityRecord]:
    """Measures every limit's metric on the data of `originals`, or recalls what was measured.

    Returns:
        Metric name -> record.
    """
    name = f"quality, {split}, {len(originals.batches)} batches, program {program.digest[:16]}"
    found = originals.journal.recall(
        name,
        lambda: {k: asdict(v) for k, v in _measure(budget, program, originals, split).items()},
    )
    return {metric: from_json(QualityRecord, record) for metric, record in found.items()}


def _measure(
    budget: Budget, program: Program, originals: Originals, split: str
) -> dict[str, QualityRecord]:
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
