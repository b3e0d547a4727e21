"""Trying candidates on top of what was accepted: a program, its quality and its cost."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from redpass.budget.accounting import cost_record
from redpass.budget.candidates import Candidate, relative_saving
from redpass.budget.quality import Judge, worse_by
from redpass.engine import Engine
from redpass.errors import RedpassError
from redpass.program import Program
from redpass.record import CostRecord


class Trials:
    """What was accepted so far, and the programs that one candidate more would make.

    All candidates were planned on the engine's current program, which stays as it is.

    Args:
        judge: measures; its first limit's metric is the loss.
        sizes: at which FLOPs are counted.
        costs: names of the costs that count as saving; all when empty.
        is_allowed: whether a program may cost as little as that.

    Attributes:
        current: the program with what was accepted.
        out: candidates that are out for good -> outcome and why.
        held: those of them that only do not go together with an accepted one.
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
        self.current = engine.program
        self.cost = cost_record(self.current, sizes)
        self.loss = 0.0
        self.out: dict[Candidate, tuple[str, str]] = {}
        self.held: list[Candidate] = []

    @property
    def step(self) -> int:
        """How many candidates were accepted."""
        return len(self.accepted)

    def attempt(self, candidate: Candidate) -> bool:
        """Tries a candidate on top of what was accepted and fills in its figures.

        Returns:
            False when it is out for good; `out` says why.
        """
        program = self.make(candidate)
        if program is None:
            return False
        try:
            quality = self.judge.measure(program)
        except RedpassError as error:
            return self._leave_out(candidate, "rolled back", str(error))
        candidate.loss = worse_by(quality[self.metric]) - self.loss
        candidate.step, candidate.program, candidate.quality = self.step, program, quality
        return True

    def make(self, candidate: Candidate) -> Program | None:
        """Returns the program with the candidate; None when it is out. Measures its saving only."""
        actions = [other.action for other in self.accepted]
        program, check = self.engine.trial(candidate.pass_, [*actions, candidate.action])
        if not check.passed:
            if self.accepted:
                self.held.append(candidate)
            self._leave_out(candidate, "rolled back", check.reason)
            return None
        cost = cost_record(program, self.sizes)
        candidate.worth = relative_saving(self.cost, cost, self.costs)
        if candidate.worth <= 0:
            self._leave_out(candidate, "refused", self._why_worthless(cost))
            return None
        if not self.is_allowed(cost):
            self._leave_out(candidate, "refused", "it takes away more than is to go")
            return None
        return program

    def _why_worthless(self, cost: CostRecord) -> str:
        if cost == self.cost:
            return "nothing of it is left to do after what was accepted"
        return f"it saves nothing of {', '.join(self.costs) or 'any cost'}"

    def _leave_out(self, candidate: Candidate, outcome: str, why: str) -> bool:
        self.out[candidate] = (outcome, why)
        return False

    def accept(self, candidate: Candidate) -> None:
        """Takes a candidate that was tried at this step."""
        assert candidate.program is not None
        assert candidate.step == self.step
        self.loss += candidate.loss
        self.current = candidate.program
        self.cost = cost_record(self.current, self.sizes)
        self.accepted.append(candidate)
        self.judge.move(self.current)
