"""`optimize`: the whole run, from a program to a checked, smaller program and its record.

The passes run in the order given; the exact ones to a fixpoint, the approximate ones under the
budget. The budget is checked at the end on data that chose nothing; a miss raises `BudgetError`.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import redpass
from redpass import config
from redpass.budget.accounting import cost_record, usual_sizes
from redpass.budget.forms import Holds
from redpass.budget.preflight import chosen_passes, grouped, preflight
from redpass.budget.repair import is_repair, repair
from redpass.budget.search import Search
from redpass.budget.spec import Budget, check_method, parse_budget
from redpass.budget.verdict import Verdict, check_possible, guilty, judge
from redpass.config import Settings
from redpass.data import Batches, Splits
from redpass.engine import Engine
from redpass.errors import BudgetError, ExportError, PassError
from redpass.facts import Facts
from redpass.journal import Journal, kept_until_done
from redpass.passes.spec import format_passes
from redpass.plan import Exactness, Pass
from redpass.program import Program
from redpass.progress import Listener, Silent, track
from redpass.record import Recipe, RunRecord
from redpass.state import renumber_state
from redpass.summary import (
    branch_records,
    dimension_range,
    layer_records,
    machine,
    matrices,
    measured_redundancy,
    numbered,
    work_key,
)
from redpass.verify.originals import Originals

MOST_ROUNDS = 4
"""How often an exact pass is run again while it still finds something."""

FEW = 8
"""How many batches tell hopeless candidates of an approximate pass from the others."""

NOT_FOR_IT = "leave the pass out of --passes; `redpass inspect` shows the structure that was found"

WRITABLE = "a folder holds drop_layers and prune_channels(together=True); or leave out --format hf"

SEE_SKIPS = "other options may find some; `redpass inspect` shows the structure that was found"


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
    search: str = "greedy",
    only_faster: bool = False,
    reduce: str | Sequence[Pass] | None = None,
    holds: Holds | None = None,
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
        search: how candidates of approximate passes are chosen: `greedy` (each step measured) or
            `allocated` (each place measured once, then rungs of all places by what they cost for
            what they save) or `one-shot` (in the order of the passes' own scores).
        reduce: approximate passes that take the place of the default pipeline's, when `passes` is
            None: `"drop_branches,prune_channels"`.
        only_faster: cuts of width stay only where the whole model is measured faster with them, or
            a cache smaller.
        holds: says why a form that has to be written cannot hold a program, or ""; then what it
            cannot hold is not tried, and default reductions leave all layers alike.

    Raises:
        UsageError: an unknown pass, option, metric, or a budget that makes no sense.
        DataError: an approximate pass without data, or data that cannot be used.
        ExportError: a form that has to be written can hold nothing that the passes named do.
        BudgetError: the budget does not hold on the reporting data; names the guilty action and
            carries the record as `.record`.
        PassError: a pass failed inside; names the reproducer.
    """
    budget = parse_budget(budget) if isinstance(budget, str) else budget
    check_method(search)
    chosen = chosen_passes(passes, reduce, budget, alike=holds is not None)
    preflight(chosen, budget, data)
    run = _Run(program, budget, data, settings or config.from_environment(), listener or Silent())
    run.sizes = sizes or usual_sizes(program)
    run.seed, run.command, run.is_named = seed, command, passes is not None or reduce is not None
    run.method, run.only_faster, run.holds = search, only_faster, holds
    work = work_key(program, chosen, budget, data, run.settings, run.sizes, seed)
    run.journal = Journal.open(journal, f"{search} {only_faster} {work}", fresh=not resume)
    with kept_until_done(run.journal, run.listener):
        return run.go(chosen)


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
    method: str = "greedy"
    is_named: bool = False
    only_faster: bool = False
    holds: Holds | None = None
    journal: Journal = field(default_factory=Journal)
    _known: dict[tuple[str, int | None], Originals] = field(default_factory=dict)

    def go(self, passes: Sequence[Pass]) -> Result:
        started = time.perf_counter()
        shared = (self.settings, self.listener, self.seed, self._calibration())
        self.engine = Engine(self.original, *shared, journal=self.journal)
        self.before = cost_record(self.original, self.sizes)
        self.searches: list[Search] = []
        if self.data is not None and self.budget.limits:
            check_possible(self.budget, self.original, self._originals)
        groups = grouped(passes)
        for group in track(groups, self.listener, "passes", len(groups)):
            self._run(group)
        self.verdict = judge(
            self.budget, self.engine.program, self.before, self._originals if self.data else None
        )
        for doubt in self.verdict.doubts:
            self.listener.message(doubt)
        program = renumber_state(self.engine.program)
        record = self._record(self.verdict, time.perf_counter() - started)
        if self.verdict.miss:
            steps = [(search.base, search.accepted) for search in self.searches]
            place = guilty(self.budget, steps, self._originals("reporting"))
            hint = "loosen --budget, or give more data"
            error = BudgetError(self.verdict.miss, place=place, hint=hint)
            error.record = record  # type: ignore[attr-defined]
            raise error
        return Result(program, record)

    def _originals(self, split: str, most: int | None = None) -> Originals:
        """What the original says about a split, or its first `most` batches; computed once."""
        known = self._known
        if (split, None) not in known:
            part: Batches = getattr(self.data, split)
            known[split, None] = Originals(self.original, part, journal=self.journal)
        if most is not None and (split, most) not in known:
            known[split, most] = known[split, None].first(most)
        return known[split, most]

    def _run(self, passes: Sequence[Pass]) -> None:
        """Runs one exact pass to its fixpoint, or searches over approximate ones together."""
        if is_repair(passes[0]):
            choosing = self._originals("choosing")
            repair(self.engine, self.budget, passes[0], choosing, self.before)
        elif passes[0].exactness is Exactness.APPROXIMATE:
            self._search(passes)
        else:
            for _ in range(MOST_ROUNDS):
                if not self.engine.run_exact(passes[0]):
                    break
        _show(passes, self.engine)

    def _search(
        self, passes: Sequence[Pass], only: frozenset[str] = frozenset(), *, again: bool = False
    ) -> None:
        search = Search(
            self.engine,
            self.budget,
            self.before,
            self._originals("calibration", FEW),
            self._originals("choosing", FEW),
            self._originals("choosing"),
            self.method,
            self.only_faster,
            self.holds,
        )
        search.run(passes, only)
        self.searches.append(search)
        if self.is_named and not search.pool and not only and not again:
            self._refuse(passes)
        if self.is_named and search.unwritable and len(search.unwritable) == len(search.pool):
            first = next(iter(search.unwritable.values()))
            raise ExportError(f"a form asked for can hold none of it: {first}", hint=WRITABLE)
        rest = [pass_ for pass_ in passes if pass_.name not in search.given_back]
        if search.given_back and rest:  # what was given back had used up a part of the budget
            self._search(rest, again=True)
        elif search.held and search.accepted and rest:
            self._search(rest, search.held)

    def _refuse(self, passes: Sequence[Pass]) -> None:
        """Raises when passes that were asked for by name find nothing they could work on."""
        skips = [s for s in self.engine.skips if s.pass_name in {pass_.name for pass_ in passes}]
        missing = [s for s in skips if s.target == "graph"]
        if missing:
            raise PassError(missing[0].reason, place=missing[0].pass_name, hint=NOT_FOR_IT)
        ladders = {pass_.name for pass_ in passes if getattr(pass_, "fits", False)}
        left = [s for s in skips if s.pass_name in ladders]
        if left:
            found = f"no place can be cut: {left[0].target}: {left[0].reason}"
            if len(left) > 1:
                found += f"; {len(left) - 1} more places"
            raise PassError(found, place=left[0].pass_name, hint=SEE_SKIPS)

    def _record(self, verdict: Verdict, seconds: float) -> RunRecord:
        engine, origin = self.engine, self.original.origin
        start = Facts(self.original, self._calibration(), self.journal)
        measured = measured_redundancy(self.searches[0].facts if self.searches else start)
        accepted = (action for search in self.searches for action in search.accepted)
        dropped = {action.target for action in accepted if action.rule.startswith("drop_")}
        branches = branch_records(self.original, self.sizes, measured, dropped)
        return RunRecord(
            version=redpass.__version__,
            command=self.command,
            model=origin.path,
            model_kind=origin.kind,
            model_digest=origin.digest,
            data=self.data.calibration.source if self.data else "",
            data_digest=self._data_digest(),
            budget=str(self.budget),
            verdict=verdict.state,
            before=self.before,
            after=cost_record(engine.program, self.sizes),
            dims={k: dimension_range(*span) for k, span in self.original.signature.dims.items()},
            passes=engine.passes,
            actions=numbered(engine.actions),
            skips=engine.skips,
            quality=list(verdict.quality),
            branches=branches,
            layers=layer_records(self.original, branches, measured),
            matrices=matrices(measured),
            curves=[search.curve for search in self.searches if search.accepted],
            latency=[],
            recipe=self._recipe(),
            notes=[*origin.notes, *verdict.doubts],
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


def _show(passes: Sequence[Pass], engine: Engine) -> None:
    settings, names = engine.settings, [pass_.name for pass_ in passes]
    if {"all", *names} & set(settings.print_after):
        engine.listener.message(f"--- after {format_passes(passes)}\n{engine.program.text}")
    if settings.dump is not None:
        settings.dump.mkdir(parents=True, exist_ok=True)
        name = f"{len(engine.passes):03d}_{names[-1]}.txt"
        (settings.dump / name).write_text(engine.program.text + "\n")
