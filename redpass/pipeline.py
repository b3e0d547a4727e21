"""`optimize`: the whole run, from a program to a checked, smaller program and its record.

The passes run in the order given; the exact ones to a fixpoint, the approximate ones under the
budget. The budget is checked at the end on data that chose nothing; a miss raises `BudgetError`.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import redpass
from redpass import config
from redpass.budget.accounting import cost_record, usual_sizes
from redpass.budget.search import Search, measure
from redpass.budget.spec import Budget, doubts, parse_budget, worst_case
from redpass.config import Settings
from redpass.data import Batches, Splits
from redpass.engine import Engine
from redpass.errors import BudgetError, DataError
from redpass.facts import Facts
from redpass.journal import Journal, kept_until_done
from redpass.passes import default_pipeline
from redpass.passes.spec import format_pass, parse_passes
from redpass.plan import Exactness, Pass
from redpass.program import Program
from redpass.progress import Listener, Silent, track
from redpass.record import QualityRecord, Recipe, RunRecord
from redpass.rewrite import apply
from redpass.summary import (
    branch_records,
    dimension_range,
    machine,
    matrices,
    measured_similarity,
    work_key,
)
from redpass.verify.metrics import find_metric
from redpass.verify.originals import Originals

MOST_ROUNDS = 4
"""How often an exact pass is run again while it still finds something."""

FEW = 8
"""How many batches tell hopeless candidates of an approximate pass from the others."""


@dataclass(frozen=True)
class Result:
    """The optimised program and the record of the run."""

    program: Program
    record: RunRecord


def optimize(
    program: Program,
    passes: str | Sequence[Pass] | None = None,
    *,
    budget: str | Budget = "",
    data: Splits | None = None,
    settings: Settings | None = None,
    listener: Listener | None = None,
    sizes: dict[str, int] | None = None,
    seed: int = 0,
    command: str = "",
    journal: Path | None = None,
    resume: bool = False,
) -> Result:
    """Optimises a program.

    Args:
        passes: a spec such as `"drop_noops,drop_branches"`, or passes; None for the default
            pipeline, which contains the approximate passes exactly when there is a budget.
        budget: what may be lost, e.g. `"cosine>=0.98"`; approximate passes need one.
        data: disjoint calibration, choosing and reporting data; approximate passes need them.
        sizes: dimension sizes at which FLOPs are counted.
        seed: seeds the inputs that before and after are compared on.
        command: the command line, for the report.
        journal: stem of the file that keeps what was measured until the result is written.
        resume: go on with what an earlier run of the same work left there.

    Raises:
        UsageError: an unknown pass, option, metric, or a budget that makes no sense.
        DataError: an approximate pass without data, or data that cannot be used.
        BudgetError: the budget does not hold on the reporting data; names the guilty action and
            carries the record as `.record`.
        PassError: a pass failed inside; names the reproducer.
    """
    budget = parse_budget(budget) if isinstance(budget, str) else budget
    chosen = _passes(passes, budget)
    _preflight(chosen, budget, data)
    run = _Run(program, budget, data, settings or config.from_environment(), listener or Silent())
    run.sizes = sizes or usual_sizes(program)
    run.seed, run.command = seed, command
    key = work_key(program, chosen, budget, data, run.settings, run.sizes, seed)
    run.journal = Journal.open(journal, key, fresh=not resume)
    with kept_until_done(run.journal, run.listener):
        return run.go(chosen)


def _passes(passes: str | Sequence[Pass] | None, budget: Budget) -> tuple[Pass, ...]:
    if passes is None:
        return default_pipeline(approximate=bool(budget.limits))
    return parse_passes(passes) if isinstance(passes, str) else tuple(passes)


def _preflight(passes: Sequence[Pass], budget: Budget, data: Splits | None) -> None:
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


@dataclass
class _Run:
    original: Program
    budget: Budget
    data: Splits | None
    settings: Settings
    listener: Listener
    sizes: dict[str, int] = None  # type: ignore[assignment]  # set right after construction
    seed: int = 0
    command: str = ""
    journal: Journal = field(default_factory=Journal)
    _known: dict[tuple[str, int | None], Originals] = field(default_factory=dict)

    def go(self, passes: Sequence[Pass]) -> Result:
        started = time.perf_counter()
        shared = (self.settings, self.listener, self.seed, self._calibration())
        self.engine = Engine(self.original, *shared, journal=self.journal)
        self.before = cost_record(self.original, self.sizes)
        self.quality: list[QualityRecord] = []
        self.searches: list[Search] = []
        self.doubts: list[str] = []
        self._check_possible()
        for pass_ in track(passes, self.listener, "passes", len(passes)):
            self._one(pass_)
        verdict, miss = self._verdict()
        record = self._record(verdict, time.perf_counter() - started)
        if miss:
            error = BudgetError(
                miss, place=self._guilty(), hint="loosen --budget, or give more data"
            )
            error.record = record  # type: ignore[attr-defined]
            raise error
        return Result(self.engine.program, record)

    def _originals(self, split: str, most: int | None = None) -> Originals:
        """What the original says about a split, or its first `most` batches; computed once."""
        key = (split, most)
        if key not in self._known:
            part: Batches = getattr(self.data, split)
            part = part[:most] if most else part
            self._known[key] = Originals(self.original, part, journal=self.journal)
        return self._known[key]

    def _check_possible(self) -> None:
        """Raises before any search when the data are too few or the untouched model misses."""
        if self.data is None or not self.budget.limits:
            return
        for limit in self.budget.limits:
            for part in (self.data.choosing, self.data.reporting):
                find_metric(limit.metric).check(self.original, part)
        found = measure(self.budget, self.original, self._originals("choosing"), "choosing")
        miss = worst_case(found, self.budget, 0.0)
        if miss:
            raise BudgetError(
                f"the original model itself misses the budget: {miss}", hint="loosen --budget"
            )

    def _one(self, pass_: Pass) -> None:
        if pass_.exactness is Exactness.APPROXIMATE:
            self._search(pass_)
        else:
            for _ in range(MOST_ROUNDS):
                if not self.engine.run_exact(pass_):
                    break
        _show(pass_, self.engine)

    def _search(self, pass_: Pass) -> None:
        search = Search(
            self.engine,
            self.budget,
            self.before,
            self._originals("calibration", FEW),
            self._originals("choosing", FEW),
            self._originals("choosing"),
        )
        search.run(pass_)
        self.searches.append(search)
        if search.held:
            self._search(pass_)

    def _verdict(self) -> tuple[str, str]:
        """Returns the verdict and, when the budget was missed, the miss in words."""
        if not self.budget.limits or self.data is None:
            return "no budget", ""
        for split in ("choosing", "reporting"):
            found = measure(self.budget, self.engine.program, self._originals(split), split)
            miss = worst_case(found, self.budget, 0.0)
            self.quality += [replace(r, met=not miss) for r in found.values()]
        self.doubts = doubts(found, self.budget)
        for doubt in self.doubts:
            self.listener.message(doubt)
        if miss:
            return "missed", f"the quality budget does not hold: {miss}"
        after = cost_record(self.engine.program, self.sizes)
        for goal in self.budget.goals:
            if not goal.reached(self.before, after):
                now, start = getattr(after, goal.cost), getattr(self.before, goal.cost)
                share = 100 * (now / start - 1) if start else 0.0
                text = f"the cost goal {goal} was not reached within {self.budget.limits[0]}"
                return "missed", f"{text}: {goal.cost} changed by {share:+.1f}%"
        return "met", ""

    def _guilty(self) -> str | None:
        """The accepted action without which, and all accepted after it, the budget holds."""
        for search in reversed(self.searches):
            for count in reversed(range(len(search.accepted))):
                trial = apply(search.base, search.accepted[:count])
                found = measure(self.budget, trial, self._originals("reporting"), "reporting")
                if not worst_case(found, self.budget, 0.0):
                    return search.accepted[count].key
        return None

    def _record(self, verdict: str, seconds: float) -> RunRecord:
        engine, origin = self.engine, self.original.origin
        base = self.searches[0].facts if self.searches else None
        start = Facts(self.original, self._calibration(), self.journal)
        measured = measured_similarity(base or start)
        dropped = {a.target for search in self.searches for a in search.accepted}
        return RunRecord(
            version=redpass.__version__,
            command=self.command,
            model=origin.path,
            model_kind=origin.kind,
            model_digest=origin.digest,
            data=self.data.calibration.source if self.data else "",
            data_digest=self._data_digest(),
            budget=str(self.budget),
            verdict=verdict,
            before=self.before,
            after=cost_record(engine.program, self.sizes),
            dims={k: dimension_range(*span) for k, span in self.original.signature.dims.items()},
            passes=engine.passes,
            actions=engine.actions,
            skips=engine.skips,
            quality=self.quality,
            branches=branch_records(self.original, self.sizes, measured, dropped),
            matrices=matrices(measured),
            latency=[],
            recipe=self._recipe(),
            notes=[*origin.notes, *self.doubts],
            machine=machine(),
            seconds=seconds,
        )

    def _calibration(self) -> Batches | None:
        return self.data.calibration if self.data else None

    def _data_digest(self) -> str:
        return self.data.calibration.digest() if self.data else ""

    def _recipe(self) -> Recipe:
        origin = self.original.origin
        return Recipe(
            passes=list(self.engine.recipe),
            model=origin.path,
            model_digest=origin.digest,
            graph_digest=self.original.digest,
            data_digest=self._data_digest(),
            seed=self.seed,
            version=redpass.__version__,
        )


def _show(pass_: Pass, engine: Engine) -> None:
    settings = engine.settings
    if {"all", pass_.name} & set(settings.print_after):
        engine.listener.message(f"--- after {format_pass(pass_)}\n{engine.program.text}")
    if settings.dump is not None:
        settings.dump.mkdir(parents=True, exist_ok=True)
        name = f"{len(engine.passes):03d}_{pass_.name}.txt"
        (settings.dump / name).write_text(engine.program.text + "\n")
