"""Removing a share of a cost whatever it does to quality: how methods are compared.

    from redpass.budget import choose

    chosen = choose(program, "drop_branches", share=0.2, data=batches)
    chosen.program, chosen.curve

A run under a budget is `redpass.optimize`.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from redpass.analysis import cost as count_cost
from redpass.budget.accounting import cost_record, usual_sizes
from redpass.budget.allocation import allocate
from redpass.budget.candidates import COSTS, MOST, Candidate, Greedy, best_guesses
from redpass.budget.curves import Path
from redpass.budget.quality import Judge
from redpass.budget.spec import Budget, Limit
from redpass.budget.stack import Stack
from redpass.budget.trials import Trials
from redpass.config import Settings
from redpass.data import Batches
from redpass.engine import Engine
from redpass.errors import UsageError, nearest
from redpass.passes.spec import as_passes
from redpass.plan import Action, Pass
from redpass.program import Program
from redpass.progress import Listener, Silent, track
from redpass.record import CostRecord, Curve
from redpass.verify.metrics import fewest, find_metric
from redpass.verify.originals import Originals, quality_port

SEARCHES = ("greedy", "allocated", "one-shot", "random")

FEW = 4
"""Greedy search tries all candidates alone on this fraction of the batches, and measures on all of
them what may be the best by that."""


@dataclass(frozen=True)
class Chosen:
    """What `choose` made.

    Attributes:
        actions: in the order in which they were chosen.
        removed: share of the cost that is gone.
        curve: quality on the choosing data after each action.
        operations: how many operations were run to measure candidates.
    """

    program: Program
    actions: tuple[Action, ...]
    removed: float
    curve: Curve
    operations: int = 0


def choose(
    program: Program,
    passes: str | Sequence[Pass],
    *,
    share: float,
    data: Batches,
    cost: str = "parameters",
    of: str = "layers",
    search: str = "greedy",
    metric: str = "",
    seed: int = 0,
    listener: Listener | None = None,
) -> Chosen:
    """Removes as much as fits in a share of a cost, the candidates of all `passes` in one pool.

    Args:
        share: 0.2 for a fifth; never more is removed, and as little less as the candidates allow.
        data: statistics and measurements come from these batches.
        cost: `parameters`, `bytes`, `flops` or `kv_bytes_per_token`.
        of: what the share is of: `layers` (what all branches cost together) or `program`.
        search: `greedy` (each step measured), `allocated` (each place measured once, then rungs of
            all places by what they cost for what they save), `one-shot` (in the order of the
            passes' own scores, nothing measured) or `random` (a control).
        metric: what greedy search keeps low; "" for `loss` where the data hold tokens and the
            output is logits, else `relative_error`.
        seed: of the random order.

    Raises:
        UsageError: an unknown name, or a share that is not between 0 and 1.
        DataError: data that the metric or the passes' statistics cannot use.
    """
    _check(share, cost, of, search)
    judged = metric or _usual_metric(program, data)
    find_metric(judged).check(program, data)
    parsed = as_passes(passes)
    engine = Engine(program, Settings(check="rules"), listener or Silent(), seed, data)
    job = _Job(engine, judged, cost, _allowed(program, share, cost, of))
    job.run(parsed, search, seed)
    return job.result(search, parsed)


def _check(share: float, cost: str, of: str, search: str) -> None:
    for value, known in ((cost, COSTS), (of, ("layers", "program")), (search, SEARCHES)):
        if value not in known:
            raise UsageError(f"'{value}' is not known here", hint=nearest(value, known))
    if not 0 < share < 1:
        raise UsageError(f"a share of {share}", hint="write 0.2 for a fifth")


def _usual_metric(program: Program, data: Batches) -> str:
    has_logits = len(quality_port(program).shape) == 3 and "input_ids" in data[0]
    return "loss" if has_logits and quality_port(program).name == "logits" else "relative_error"


def _allowed(program: Program, share: float, cost: str, of: str) -> float:
    """How much of the cost may go, as a share of the program's."""
    sizes = usual_sizes(program)
    whole = float(getattr(cost_record(program, sizes), cost))
    if of == "program" or not whole:
        return share
    branches = count_cost(program).by_branch.values()
    known = {name: sizes[name] for name in program.signature.dims if name in sizes}
    parts = (b.flops(known) if cost == "flops" else getattr(b, cost) for b in branches)
    return share * min(1.0, sum(parts) / whole)


class _Job:
    def __init__(self, engine: Engine, metric: str, cost: str, allowed: float) -> None:
        self.engine, self.cost, self.allowed = engine, cost, allowed
        assert engine.calibration is not None
        judged = find_metric(metric)
        better = judged.better
        limit = Limit(metric, "<=" if better == "lower" else ">=", float("inf"), relative=False)
        originals = Originals(engine.program, engine.calibration)
        count = max(len(engine.calibration) // FEW, len(fewest(judged, engine.calibration)))
        few = Originals(engine.program, engine.calibration[:count])
        judge = Judge(Budget((limit,)), engine.program, originals, "calibration", few)
        sizes = usual_sizes(engine.program)
        self.start = cost_record(engine.program, sizes)
        self.trials = Trials(
            engine, judge, sizes, [cost], lambda now: self._removed(now) <= self.allowed
        )
        self.path = Path(metric, better, cost)

    def run(self, passes: Sequence[Pass], search: str, seed: int) -> None:
        pool = [
            Candidate(pass_, action)
            for pass_ in passes
            for action in self.engine.plan(pass_).actions
        ]
        if search == "greedy":
            self._greedy(pool)
        elif search == "allocated":
            self._allocated(pool)
        elif search == "random":
            random.Random(seed).shuffle(pool)
            self._in_order(pool)
        else:
            self._in_order(best_guesses(pool))

    def _greedy(self, pool: list[Candidate]) -> None:
        greedy, listener = Greedy(self.trials.attempt), self.engine.listener
        ranked = best_guesses(pool)
        for candidate in track(ranked[:MOST], listener, "trying candidates alone", len(pool)):
            self.trials.attempt(candidate, quick=True)
        stage = f"choosing among {len(pool)} candidates"
        listener.start(stage, len(pool))
        while pool:
            best = greedy.next([c for c in pool if c not in self.trials.out], self.trials.step)
            if best is None:
                break
            self.trials.accept(best)
            self._note(best)
            left = [c for c in pool if c is not best and c not in self.trials.out]
            for _ in range(len(pool) - len(left)):
                listener.advance(stage)
            pool = left
        listener.finish(stage)

    def _allocated(self, pool: Sequence[Candidate]) -> None:
        order = allocate(pool, self.trials, self.start, self.engine.listener)
        stack = Stack(self.trials, order)

        def fits(count: int) -> bool:
            cost = cost_record(stack.program(count), self.trials.sizes)
            return self._removed(cost) <= self.allowed

        stack.take(stack.last_good(fits, len(stack.order)))

    def _in_order(self, pool: Sequence[Candidate]) -> None:
        for candidate in pool:
            if self._make(candidate):
                self.trials.accept(candidate)

    def _make(self, candidate: Candidate) -> bool:
        made = self.trials.make(candidate)
        candidate.step, candidate.loss = self.trials.step, 0.0
        return made is not None

    def _removed(self, now: CostRecord) -> float:
        return 1 - float(getattr(now, self.cost)) / float(getattr(self.start, self.cost))

    def _note(self, candidate: Candidate) -> None:
        record = candidate.quality[self.trials.metric]
        self.path.add(self.start, self.trials.cost, record, candidate.action.key)

    def result(self, search: str, passes: Sequence[Pass]) -> Chosen:
        actions = tuple(candidate.action for candidate in self.trials.accepted)
        names = ", ".join(pass_.name for pass_ in passes)
        curve = self.path.curve(f"{search}: {names}")
        done = self.trials.judge.prefix.executed
        return Chosen(self.trials.current, actions, self._removed(self.trials.cost), curve, done)
