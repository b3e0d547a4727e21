"""Recipes: replaying a run without its data, and finding the action that broke a result."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from redpass.budget.repair import is_repair
from redpass.config import Settings
from redpass.data import Batches
from redpass.engine import Engine, first_bad
from redpass.errors import DataError, LoadError, PassError
from redpass.passes.spec import parse_passes
from redpass.plan import Action, Pass
from redpass.program import Program
from redpass.progress import Listener, Silent
from redpass.record import Recipe, from_json
from redpass.state import renumber_state


def read_recipe(path: Path) -> Recipe:
    """Reads a `plan.json`. Raises `LoadError` when it is missing or not a recipe."""
    try:
        return from_json(Recipe, json.loads(path.read_text()))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise LoadError(
            f"not a recipe: {error}", file=path, hint="give the plan.json of an artifact"
        ) from error


def replay(
    program: Program,
    recipe: Recipe,
    *,
    limit: int | None = None,
    listener: Listener | None = None,
    data: Batches | None = None,
) -> Program:
    """Applies a recipe to the model it was made from. Every step is checked as in the first run.

    Args:
        limit: apply only the first `limit` actions.
        data: the calibration data of the run; a recipe with a repair needs them, as its weights
            are computed anew.

    Raises:
        LoadError: the model is not the one the recipe was made from.
        DataError: the recipe needs data, and they are missing or not those of the run.
        PassError: an action of the recipe is not planned any more, or fails its check.
    """
    return renumber_state(_replayed(program, recipe, limit, listener, data))


def _replayed(
    program: Program,
    recipe: Recipe,
    limit: int | None = None,
    listener: Listener | None = None,
    data: Batches | None = None,
) -> Program:
    """The result with the names of its state as they were, so that the model's data still fit."""
    _check_same(program, recipe)
    engine = Engine(program, Settings(limit=limit), listener or Silent(), recipe.seed, data)
    if data is not None and recipe.data_digest != data.digest():
        text = "these are not the calibration data that the recipe was made with"
        raise DataError(text, file=data.source, hint="give the same file with the same options")
    for spec, keys in recipe.passes:
        wanted = keys if limit is None else keys[: max(0, limit - engine.applied)]
        if wanted:
            _replay_step(engine, parse_passes(spec), wanted)
    return engine.program


def needs_data(recipe: Recipe) -> bool:
    """Whether replaying takes the calibration data of the run: weights are computed from them."""
    passes = (pass_ for spec, _ in recipe.passes for pass_ in parse_passes(spec))
    return any(is_repair(pass_) or getattr(pass_, "fits", False) for pass_ in passes)


def bisect(
    program: Program,
    recipe: Recipe,
    is_good: Callable[[Program], bool],
    data: Batches | None = None,
) -> str | None:
    """Returns the key of the first action after which the result is bad, None if it never is.

    Args:
        is_good: judges a program; asked about log2 of the number of actions.
        data: as for `replay`.

    Raises:
        PassError: the model is bad before any action.
    """
    keys = [key for _, actions in recipe.passes for key in actions]
    if is_good(_replayed(program, recipe, data=data)):
        return None
    if not is_good(program):
        raise PassError("the model is bad before any action", hint="bisect needs a good start")
    count = first_bad(len(keys), lambda n: not is_good(_replayed(program, recipe, n, data=data)))
    return keys[count - 1]


def _check_same(program: Program, recipe: Recipe) -> None:
    origin = program.origin
    pairs = (
        ("weights", recipe.model_digest, origin.digest),
        ("graph", recipe.graph_digest, program.digest),
    )
    for what, wanted, found in pairs:
        if wanted != found:
            raise LoadError(
                f"its {what} differ from those the recipe was made from "
                f"({found[:12] or 'none'} against {wanted[:12] or 'none'})",
                file=origin.path,
                hint=f"the recipe belongs to {recipe.model}, redpass {recipe.version}",
            )


def _replay_step(engine: Engine, passes: Sequence[Pass], keys: list[str]) -> None:
    """Applies the actions called `keys`, which the passes plan on the same program."""
    plans = [engine.plan(pass_).actions for pass_ in passes]
    planned = {action.key: action for actions in plans for action in actions}
    missing = [key for key in keys if key not in planned]
    if missing:
        raise PassError("an action of the recipe is not planned any more", place=missing[0])
    actions: list[Action] = [planned[key] for key in keys]
    after, check = engine.trial(passes[0], actions)
    if not check.passed:
        raise PassError(f"the recipe fails its check: {check.reason}", place=passes[0].name)
    engine.adopt(after, passes, actions, check)
    engine.applied += len(actions)
