"""Trying candidates on top of what was accepted: a program, its quality and its cost."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import asdict

from redpass.budget.accounting import cost_record
from redpass.budget.candidates import Candidate, relative_saving
from redpass.budget.quality import Judge, Quality, worse_by
from redpass.engine import Engine
from redpass.errors import RedpassError
from redpass.fingerprint import fingerprint
from redpass.plan import Narrow
from redpass.program import Program
from redpass.record import CostRecord, from_json


class Trials:
    """What was accepted so far, and the programs that one candidate more would make.

    All candidates were planned on the engine's current program, which stays as it is.

    Args:
        judge: measures; its first limit's metric is the loss.
        sizes: at which FLOPs are counted.
        costs: names of the costs that count as saving; all when empty.
        is_allowed: whether a program may cost as little as that.

    Attributes:
        cost: what the program with what was accepted costs.
        out: candidates that are out for good -> outcome and why.
        held: those of them that only do not go together with an accepted one.
        step: how many times something was accepted.
    """

    def __init__(
        self,
        engine: Engine,
        judge: Judge,
        sizes: dict[str, int],
        costs: Sequence[str] = (),
        is_allowed: Callable[[CostRecord], bool] = lambda _: True,
    ) -> None:
        self.engine, self.judge, self.sizes, self.costs = engine, judge, sizes, tuple(costs)
        self.is_allowed = is_allowed
        self.metric = judge.budget.limits[0].metric
        self.accepted: list[Candidate] = []
        self._current: Program | None = engine.program
        self._made: dict[Candidate, Program] = {}
        self.cost = cost_record(engine.program, sizes)
        self.loss = 0.0
        self.out: dict[Candidate, tuple[str, str]] = {}
        self.held: list[Candidate] = []
        self.step = 0

    @property
    def current(self) -> Program:
        """The program with what was accepted, made when it is asked for.

        A run that goes on where it was killed accepts again what it had accepted; it makes the last
        one only.
        """
        if self._current is None:
            program, fault = self.together(self.accepted)
            assert program is not None, fault
            self._current = program
        return self._current

    def attempt(self, candidate: Candidate, *, quick: bool = False) -> bool:
        """Tries a candidate on top of what was accepted and fills in its figures.

        Args:
            quick: on the few batches of the judge: its figures order, and it has to be tried in
                earnest before it can be accepted.

        Returns:
            False when it is out for good; `out` says why.
        """
        if not self._try(candidate):
            return False
        try:
            quality = self.measure(candidate, self.judge, quick=quick)
        except RedpassError as error:
            return self._leave_out(candidate, "rolled back", str(error))
        candidate.loss = worse_by(quality[self.metric]) - self.loss
        candidate.quality = quality
        if not quick:
            candidate.step = self.step
        if quick or not self.accepted:  # many are tried alone, each with weights of its own
            self._made.pop(candidate, None)
        return True

    def measure(self, candidate: Candidate, judge: Judge, *, quick: bool = False) -> Quality:
        """Returns what a judge says about the program with a candidate tried at this step."""
        return judge.measure(lambda: self.program(candidate), quick=quick, mark=candidate.mark)

    def _try(self, candidate: Candidate) -> bool:
        """Fills in the program's fingerprint and cost; False when there is no program.

        A resumed run is told both by its journal: making a program takes longer than reading them.
        """
        journal = self.engine.journal

        def compute() -> list[object] | None:
            program = self.make(candidate)
            if program is None:
                return None
            assert candidate.cost is not None
            mark = fingerprint(program) if journal.path else ""
            return [mark, asdict(candidate.cost)]

        found = journal.recall(
            f"trial of {candidate.action.key}", compute, lambda: self._on(candidate)
        )
        if found is None:
            if candidate not in self.out:  # another run found that out: why, this one does not know
                self.make(candidate)
            return False
        candidate.mark, cost = found
        self._price(candidate, from_json(CostRecord, cost))
        return True

    def _price(self, candidate: Candidate, cost: CostRecord) -> None:
        candidate.cost = cost
        candidate.worth = relative_saving(self.cost, cost, self.costs)

    def _on(self, candidate: Candidate) -> str:
        """What a trial is of, beside the action's name: what it predicts and what it comes on."""
        beside = [other.action.key for other in self._beside(candidate)]
        work = f"{candidate.action.loss!r} {candidate.action.saving} {beside}"
        base = fingerprint(self.engine.program)
        return f"{hashlib.sha256(work.encode()).hexdigest()[:16]} on {base}"

    def program(self, candidate: Candidate) -> Program:
        """Returns the program with a candidate that was tried at this step, made when it is not."""
        program = self._made.get(candidate) or self.make(candidate)
        assert program is not None
        return program

    def make(self, candidate: Candidate) -> Program | None:
        """Returns the program with the candidate; None when it is out. Measures its cost only."""
        program, fault = self.together([*self._beside(candidate), candidate])
        if program is None:
            self.reject(candidate, fault, is_conflict=bool(self.accepted))
            return None
        cost = cost_record(program, self.sizes)
        self._price(candidate, cost)
        if candidate.worth <= 0:
            self._leave_out(candidate, "refused", self._why_worthless(cost))
            return None
        if not self.is_allowed(cost):
            self._leave_out(candidate, "refused", "it takes away more than is to go")
            return None
        self._made[candidate] = program
        return program

    def together(self, candidates: Sequence[Candidate]) -> tuple[Program | None, str]:
        """Returns the program with exactly these candidates, or None and why there is none."""
        if not candidates:
            return self.engine.program, ""
        program, check = self.engine.trial(candidates[-1].pass_, [c.action for c in candidates])
        return (program, "") if check.passed else (None, check.reason)

    def reject(self, candidate: Candidate, why: str, *, is_conflict: bool) -> None:
        """Leaves a candidate out whose program breaks a rule; held when only beside others."""
        if is_conflict:
            self.held.append(candidate)
        self._leave_out(candidate, "rolled back", why)

    def _beside(self, candidate: Candidate) -> list[Candidate]:
        """What was accepted, without rivals of the candidate."""
        return [other for other in self.accepted if other.place != candidate.place]

    def _why_worthless(self, cost: CostRecord) -> str:
        if cost == self.cost:
            return "nothing of it is left to do after what was accepted"
        return f"it saves nothing of {', '.join(self.costs) or 'any cost'}"

    def _leave_out(self, candidate: Candidate, outcome: str, why: str) -> bool:
        self.out[candidate] = (outcome, why)
        return False

    def accept(self, candidate: Candidate) -> list[Candidate]:
        """Takes a candidate that was tried at this step; returns the rivals that give way to it."""
        assert candidate.step == self.step
        assert candidate.cost is not None
        self.loss += candidate.loss
        rivals = [other for other in self.accepted if other.place == candidate.place]
        beside = self._beside(candidate)
        self._go_on([*beside, candidate], self._made.get(candidate), candidate.cost)
        self.judge.move(lambda: self.current)
        return rivals

    def drop_idle(self) -> list[Candidate]:
        """Takes out what later ones made idle, as the cut of a branch that is gone; returns it."""
        idle = []
        for candidate in list(self.accepted):
            cut = {edit.weight for edit in candidate.action.edits if isinstance(edit, Narrow)}
            if not candidate.action.place or cut & self.current.weights.keys():
                continue
            rest = [other for other in self.accepted if other is not candidate]
            program, _ = self.together(rest)
            if program is not None and fingerprint(program) == fingerprint(self.current):
                self.take(rest, program)
                idle.append(candidate)
        return idle

    def take(self, candidates: Sequence[Candidate], program: Program) -> None:
        """Makes `candidates`, and the program with them, what was accepted."""
        self._go_on(candidates, program, cost_record(program, self.sizes))

    def _go_on(
        self, candidates: Sequence[Candidate], program: Program | None, cost: CostRecord
    ) -> None:
        """Begins a step. Programs tried before it are let go: each holds weights of its own."""
        self.accepted, self._current, self.cost = list(candidates), program, cost
        self._made = {}
        self.step += 1
