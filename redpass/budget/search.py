"""Choosing among the candidates of approximate passes under a budget, on measured quality.

Candidates of all passes of one search are one pool. Greedy search measures each alone on a few
calibration batches, and refuses those that miss the budget already there. Then it takes one at a
time: the one that harms least for what it saves, on top of what was accepted, is measured on the
choosing data, and stays only if every limit holds with a margin (one-sided 95%). Allocated search
measures each place once, fills rungs of all ladders in the order of what they cost for what they
save (`allocation`), and takes as many as the limits allow; one-shot search does so in the order of
the passes' own scores, measuring nothing before. The reporting data are not touched here.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from redpass.budget.allocation import allocate
from redpass.budget.at_once import RIVAL, take_at_once
from redpass.budget.candidates import MOST, Candidate, Greedy, best_guesses
from redpass.budget.curves import Path
from redpass.budget.forms import Holds, unwritable
from redpass.budget.quality import Judge, Quality, figures
from redpass.budget.spec import CONFIDENCE, Budget, worst_case
from redpass.budget.speed import give_back
from redpass.budget.trials import Trials
from redpass.engine import Check, Engine
from redpass.errors import RedpassError
from redpass.passes.spec import format_passes
from redpass.plan import Action, Pass, Plan
from redpass.progress import track
from redpass.record import CostRecord, Curve
from redpass.verify.originals import Originals

HOPELESS = 3.0
"""A candidate that misses a limit by this many standard errors on a few batches is not measured
on the rest."""

IDLE = "nothing of it is left: what was taken later removed the place"


@dataclass
class Search:
    """One search over the candidates of some passes.

    Args:
        before: what the original costs; goals are relative to it.
        screening: the original's outputs on a few calibration batches.
        first: its outputs on a few choosing batches, where hopeless candidates stop.
        choosing: its outputs on all the data that decide.
        method: one of `spec.METHODS`.
        only_faster: whether cuts of width that make the model no faster are given back.
        holds: says why a form that has to be written cannot hold a program, or "".
    """

    engine: Engine
    budget: Budget
    before: CostRecord
    screening: Originals
    first: Originals
    choosing: Originals
    method: str = "greedy"
    only_faster: bool = False
    holds: Holds | None = None

    def run(self, passes: Sequence[Pass], only: frozenset[str] = frozenset()) -> list[Action]:
        """Plans, tries the candidates, adopts what was accepted and returns it.

        Args:
            only: keys of the candidates to try; all when empty.

        Returns:
            The accepted actions. Keys in `held` were not tried because they do not go together with
            an accepted one; plan again on the new program to try them. Cuts of the passes named in
            `given_back` were taken out again; others were refused beside them and may now be taken.
        """
        started = time.perf_counter()
        self.base = self.engine.program
        plans = [(pass_, self.engine.plan(pass_)) for pass_ in passes]
        self.facts, nodes = self.engine.facts, len(self.base.graph.nodes)
        self.given_back: set[str] = set()
        self._prepare(plans, only)
        pool = self._writable([c for c in self.pool if self._is_permitted(c)])
        if self.method == "greedy":
            self._greedy(pool)
        elif self.method == "allocated":
            self._allocate(pool)
        else:
            self._at_once(best_guesses(pool))
        for candidate in self.trials.drop_idle():
            self.engine.withdraw(candidate.pass_, candidate.action, IDLE)
        if self.only_faster:
            self._give_back()
        self._adopt()
        self._note_passes(plans, nodes, started)
        return self.accepted

    def _prepare(self, plans: Sequence[tuple[Pass, Plan]], only: frozenset[str]) -> None:
        self.pool = [
            Candidate(pass_, action)
            for pass_, plan in plans
            for action in plan.actions
            if not only or action.key in only
        ]
        screening = Judge(self.budget, self.base, self.screening, "calibration")
        self.judge = Judge(self.budget, self.base, self.choosing, "choosing", self.first)
        costs = [goal.cost for goal in self.budget.goals]
        self.trials = Trials(self.engine, screening, self.before.sizes, costs)
        first = self.budget.limits[0]
        self.path = Path(first.metric, "lower" if first.relation == "<=" else "higher")

    @property
    def accepted(self) -> list[Action]:
        """The accepted actions, in order."""
        return [candidate.action for candidate in self.trials.accepted]

    @property
    def held(self) -> frozenset[str]:
        """Keys of the candidates that did not go together with an accepted one."""
        return frozenset(candidate.action.key for candidate in self.trials.held)

    @property
    def curve(self) -> Curve:
        """Quality on the choosing data after each accepted action."""
        names = ", ".join(dict.fromkeys(candidate.pass_.name for candidate in self.pool))
        return self.path.curve(f"{self.method}: {names}")

    def _is_permitted(self, candidate: Candidate) -> bool:
        named = {candidate.action.key, candidate.pass_.name} & set(self.engine.settings.skip)
        if named:
            self._note(candidate, "skipped by user", "named in REDPASS_SKIP")
        return not named

    def _writable(self, pool: list[Candidate]) -> list[Candidate]:
        """The candidates that every form asked for can hold; the others get their reason."""
        self.unwritable = unwritable(self.engine, pool, self.holds) if self.holds else {}
        for candidate, why in self.unwritable.items():
            self._note(candidate, "refused", f"a form asked for cannot hold it: {why}")
        return [candidate for candidate in pool if candidate not in self.unwritable]

    def _note(self, candidate: Candidate, outcome: str, why: str) -> None:
        if outcome == "applied":
            self.engine.applied += 1
            self.engine.listener.message(f"accepted {candidate.action.key}: {why}")
        self.engine.note(candidate.pass_, candidate.action, outcome, why)

    def _greedy(self, pool: list[Candidate]) -> None:
        pool = self._screen(pool)
        greedy, stage = Greedy(self.trials.attempt), f"choosing among {len(pool)} candidates"
        self.engine.listener.start(stage, len(pool))
        while pool and not self._is_over(pool):
            best = greedy.next(pool, self.trials.step)
            settled = [c for c in pool if c is best or c in self.trials.out]
            pool = [c for c in pool if c not in settled]
            for candidate in settled:
                self._note(candidate, *(self._settle(candidate)))
                self.engine.listener.advance(stage)
        self.engine.listener.finish(stage)

    def _settle(self, candidate: Candidate) -> tuple[str, str]:
        return self.trials.out.get(candidate) or self._decide(candidate)

    def _is_over(self, pool: Sequence[Candidate]) -> bool:
        """Whether no more is to be accepted; then what is left gets its reason."""
        limit = self.engine.settings.limit
        outcome = None
        if limit is not None and self.engine.applied >= limit:
            outcome = ("beyond limit", f"REDPASS_LIMIT={limit}")
        elif self.trials.accepted and self.budget.reached(self.before, self.trials.cost):
            outcome = ("refused", "not needed: the cost goal was reached before it")
        if outcome:
            for candidate in pool:
                self._note(candidate, *outcome)
        return outcome is not None

    def _screen(self, pool: Sequence[Candidate]) -> list[Candidate]:
        """Measures candidates alone; returns those that are not hopeless already."""
        ranked = best_guesses(pool)
        left = []
        stage = f"screening {min(MOST, len(pool))} of {len(pool)} candidates"
        for candidate in track(ranked[:MOST], self.engine.listener, stage, len(ranked[:MOST])):
            if not self.trials.attempt(candidate):
                self._note(candidate, *self.trials.out[candidate])
                continue
            self._describe(candidate)
            miss = worst_case(candidate.quality, self.budget, 0.0)
            if miss:
                self._note(candidate, "refused", f"alone already: {miss}")
            else:
                left.append(candidate)
        return left + ranked[MOST:]

    def _describe(self, candidate: Candidate) -> None:
        """Puts what the candidate measured alone into its action, for reports."""
        metric = self.trials.metric
        evidence = {**candidate.action.evidence, metric: candidate.quality[metric].value}
        candidate.action = replace(candidate.action, loss=candidate.loss, evidence=evidence)

    def _decide(self, candidate: Candidate) -> tuple[str, str]:
        """Measures a candidate on the choosing data; accepts it if the limits hold."""
        try:
            first = self.trials.measure(candidate, self.judge, quick=True)
            hopeless = worst_case(first, self.budget, -HOPELESS)
            if hopeless:
                return "refused", f"on the first batches: {hopeless}"
            is_all = self.judge.few is self.judge.originals
            quality = first if is_all else self.trials.measure(candidate, self.judge)
        except RedpassError as error:
            return "rolled back", str(error)
        miss = worst_case(quality, self.budget, CONFIDENCE)
        if miss:
            return "refused", miss
        self._accept(candidate, quality)
        return "applied", figures(quality)

    def _accept(self, candidate: Candidate, quality: Quality) -> None:
        for old in self.trials.accept(candidate):
            self.engine.withdraw(old.pass_, old.action, RIVAL)
        self.judge.move(lambda: self.trials.current)
        record = quality[self.trials.metric]
        self.path.add(self.before, self.trials.cost, record, candidate.action.key)

    def _at_once(self, order: Sequence[Candidate]) -> None:
        """Accepts as many of the first candidates as the limits allow and the goals need."""
        found = take_at_once(self.engine, self.trials, self.judge, self.before, order)
        if found.accepted:
            record = found.quality[self.trials.metric]
            self.path.add(self.before, self.trials.cost, record, found.accepted[-1].action.key)
        for candidate, outcome in {**self.trials.out, **found.outcomes}.items():
            self._note(candidate, *outcome)

    def _allocate(self, pool: Sequence[Candidate]) -> None:
        """Accepts what an allocation over all places gives, as deep as the limits allow."""
        order = allocate(pool, self.trials, self.before, self.engine.listener)
        for candidate in pool:
            if candidate not in order and candidate not in self.trials.out:
                self._note(candidate, "refused", "others save as much for less")
        self._at_once(order)

    def _give_back(self) -> None:
        """Gives cuts back that make the model no faster; see `speed`."""
        for candidate, why in give_back(self.engine, self.trials, self.budget, self.before):
            self.given_back.add(candidate.pass_.name)
            self.engine.withdraw(candidate.pass_, candidate.action, why)

    def _adopt(self) -> None:
        """Makes the result the engine's program, as one step that can be replayed."""
        count, total = len(self.accepted), len(self.pool)
        self.check = Check("checked", f"{count} of {total} candidates within budget")
        if not count:
            return
        resolved = self._resolved()
        self.engine.adopt(self.trials.current, resolved, self.accepted, self.check)
        keys = [action.key for action in self.accepted]
        self.engine.recipe.append((format_passes(resolved), keys))

    def _resolved(self) -> list[Pass]:
        """The passes with what was accepted by name: they plan the same again without data."""
        targets: dict[Pass, list[str]] = {}
        for candidate in self.trials.accepted:
            targets.setdefault(candidate.pass_, []).append(candidate.action.target)
        return [replace(pass_, only=tuple(only)) for pass_, only in targets.items()]  # type: ignore[type-var]

    def _note_passes(self, plans: Sequence[tuple[Pass, Plan]], nodes: int, started: float) -> None:
        for pass_, plan in plans:
            applied = sum(candidate.pass_ is pass_ for candidate in self.trials.accepted)
            self.engine.note_skips(pass_, plan)
            self.engine.note_pass(pass_, applied, len(plan.skips), self.check, nodes, started)
            started = time.perf_counter()
