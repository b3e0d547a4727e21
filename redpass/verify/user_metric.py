"""Metrics of the user's own: a function by dotted name, found, called and judged."""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from redpass.data import Batches
from redpass.errors import DataError, RedpassError, UsageError, nearest
from redpass.program import Program
from redpass.verify.estimate import Estimate, Samples, mean

UserFunction = Callable[[Program, Program, Batches], Any]
Outcome = Estimate | Tensor | float


def find(name: str) -> UserFunction:
    """Imports the function called `package.module:function` (or with a dot for the colon).

    Modules in the working directory are found too.

    Raises:
        UsageError: the module cannot be imported, or holds no such function.
    """
    module_name, _, function_name = name.partition(":")
    if not function_name:
        module_name, _, function_name = name.rpartition(".")
    try:
        with _working_directory():
            module = importlib.import_module(module_name)
    except Exception as error:
        found = f"cannot import '{module_name}': {type(error).__name__}: {error}"
        hint = "write package.module:function of a module that Python can import"
        raise UsageError(found, place=f"metric '{name}'", hint=hint) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        known = [key for key, value in vars(module).items() if callable(value)]
        raise UsageError(
            f"'{module_name}' holds no function '{function_name}'",
            place=f"metric '{name}'",
            hint=nearest(function_name, known),
        )
    return function  # type: ignore[no-any-return]


@contextmanager
def _working_directory() -> Iterator[None]:
    here = str(Path.cwd())
    sys.path.append(here)
    try:
        yield
    finally:
        sys.path.remove(here)


def better(function: UserFunction) -> str:
    """Returns the function's direction: its attribute `better`, or `higher`."""
    return "lower" if getattr(function, "better", "higher") == "lower" else "higher"


def call(
    name: str, function: UserFunction, program: Program, original: Program, batches: Batches
) -> Outcome:
    """Calls a user's metric and looks at what it returned.

    Raises:
        DataError: it raised, or returned no number or NaN; the message names the metric.
    """
    place = f"metric '{name}'"
    try:
        result = function(program, original, batches)
    except RedpassError:
        raise
    except Exception as error:
        raise DataError(f"raised {type(error).__name__}: {error}", place=place) from error
    outcome = _outcome(result)
    if outcome is None:
        found = f"returned {type(result).__name__}"
        hint = "return a number, one number a row, or an Estimate"
        raise DataError(found, place=place, hint=hint)
    if _is_nan(outcome):
        raise DataError("returned NaN", place=place, hint="return a finite number")
    return outcome


def estimate(now: Outcome, was: Outcome) -> Estimate:
    """Returns the estimate for a metric's outcomes on the program and on the original.

    One number alone carries no error: its standard errors are 0, as if exact. An `Estimate` that
    holds a difference to the original is taken as it is.
    """
    if isinstance(now, Estimate) and not math.isnan(now.difference):
        return now
    if isinstance(now, Tensor) and isinstance(was, Tensor) and now.shape == was.shape:
        return mean([Samples(now, was, torch.ones_like(now))])
    value, original = _value(now), _value(was)
    stderr = now.stderr if isinstance(now, Estimate) else 0.0
    count = now.count if isinstance(now, Estimate) else 0
    return Estimate(value, stderr, count, original, value - original, stderr)


def _outcome(result: Any) -> Outcome | None:
    if isinstance(result, Estimate):
        return result
    if isinstance(result, bool | str | bytes) or result is None:
        return None
    if isinstance(result, Sequence | Tensor) or hasattr(result, "__array__"):
        rows = torch.as_tensor(result)
        usable = rows.dim() == 1 and len(rows) > 0
        return float(rows) if rows.dim() == 0 else rows.double() if usable else None
    return float(result) if isinstance(result, int | float) else None


def _is_nan(outcome: Outcome) -> bool:
    if isinstance(outcome, Tensor):
        return bool(outcome.isnan().any())
    return math.isnan(_value(outcome))


def _value(outcome: Outcome) -> float:
    if isinstance(outcome, Estimate):
        return outcome.value
    return outcome.mean().item() if isinstance(outcome, Tensor) else outcome
