"""`redpass replay` and `redpass bisect`: a run again, and the action in it that did harm."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from redpass.cli import sources
from redpass.cli.options import (
    Budget,
    DataFile,
    DataOptions,
    Model,
    ModelOptions,
    PathArgument,
    ResultOptions,
    RunOptions,
)
from redpass.cli.screen import Screen
from redpass.errors import DataError, UsageError

if TYPE_CHECKING:
    from redpass.data import Batches
    from redpass.program import Program
    from redpass.record import Recipe

PlanFile = Annotated[
    Path, PathArgument(metavar="PLAN", help="The plan.json of a result, or its folder.")
]


def replay(
    plan: PlanFile,
    model: Model,
    source: ModelOptions,
    rows: DataOptions,
    result: ResultOptions,
    run: RunOptions,
    data: DataFile = None,
) -> None:
    """Apply the recipe PLAN to the model it was made from, without searching again."""
    from redpass.artifact import staged

    formats = sources.check_formats(result.format)
    sources.check_model(model, source)
    if result.out is None:
        raise UsageError("no place for the result", place="--out", hint="name a folder")
    screen = Screen(run)
    with (
        staged(result.out, source=model, force=result.force) as folder,
        screen.listening() as listener,
    ):
        from redpass import export, recipe

        wanted = _recipe(plan)
        if data is None and recipe.needs_data(wanted):
            hint = "give --data FILE and the row options of the run; its report names the file"
            raise DataError(
                "weights of this plan are computed from data", place="--data", hint=hint
            )
        sources.prepare(run)
        program = sources.load(
            model, source, data=data, tokenizer=rows.tokenizer, listener=listener
        )
        known = _calibration(wanted, program, data, rows)
        replayed = recipe.replay(program, wanted, listener=listener, data=known)
        export.write(replayed, folder, formats)
    paths = sorted(path for path in result.out.rglob("*") if path.is_file())
    screen.emit({"written": [str(path) for path in paths]})
    screen.wrote(paths)


def bisect(
    plan: PlanFile,
    model: Model,
    source: ModelOptions,
    rows: DataOptions,
    run: RunOptions,
    data: DataFile = None,
    budget: Budget = "",
) -> None:
    """Find the first action of PLAN after which --budget does not hold on --data."""
    from redpass.errors import clean

    sources.check_model(model, source)
    if data is None:
        raise DataError("the result is judged on data", place="--data", hint="pass --data FILE")
    if not budget:
        raise UsageError("what is good?", place="--budget", hint="e.g. --budget 'cosine>=0.98'")
    sources.check_data(data)
    screen = Screen(run)
    with screen.listening() as listener:
        from redpass import recipe

        wanted = _recipe(plan)
        sources.prepare(run)
        program = sources.load(
            model, source, data=data, tokenizer=rows.tokenizer, listener=listener
        )
        judge = _judge(program, budget, sources.read(data, program, rows))
        known = _calibration(wanted, program, data, rows)
        guilty = recipe.bisect(program, wanted, judge, known)
    screen.emit({"guilty": guilty})
    if guilty is None:
        screen.show("the budget holds with all actions of the plan")
    else:
        screen.show(f"the first action after which the budget does not hold: {clean(guilty)}")


def _recipe(plan: Path) -> Recipe:
    from redpass.recipe import read_recipe

    return read_recipe(plan / "plan.json" if plan.is_dir() else plan)


def _calibration(
    wanted: Recipe, program: Program, data: Path | None, rows: DataOptions
) -> Batches | None:
    """The part of the data that a run would take statistics from, where the recipe needs it."""
    from redpass.data import split
    from redpass.recipe import needs_data

    if data is None or not needs_data(wanted):
        return None
    return split(sources.read(data, program, rows)).calibration


def _judge(program: Program, budget: str, data: Batches) -> Callable[[Program], bool]:
    from redpass.budget.quality import measure
    from redpass.budget.spec import parse_budget, worst_case
    from redpass.verify.originals import Originals

    wanted = parse_budget(budget)
    originals = Originals(program, data)

    def is_good(trial: Program) -> bool:
        return not worst_case(measure(wanted, trial, originals, "choosing"), wanted, 0.0)

    return is_good
