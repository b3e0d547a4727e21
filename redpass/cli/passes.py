"""`redpass passes`: what can be done to a model."""

from __future__ import annotations

import dataclasses
import inspect
from typing import TYPE_CHECKING, Any

from redpass.cli.options import RunOptions
from redpass.cli.screen import Screen

if TYPE_CHECKING:
    from redpass.plan import Pass

ALWAYS, WITH_BUDGET, BY_NAME = "always", "with a budget", "by name"
"""When a pass runs that nobody asked for, or that it has to be asked for."""


def passes(run: RunOptions) -> None:
    """List every pass: what it removes, what it promises, its options."""
    from redpass.passes import PASSES
    from redpass.report.terminal import pass_list

    screen = Screen(run)
    described = [_describe(kind) for kind in PASSES.values()]
    screen.emit(described)
    screen.show(pass_list(described))


def _describe(kind: type[Pass]) -> dict[str, Any]:
    from redpass.passes import ON_REQUEST, REDUCE

    text = inspect.getdoc(kind) or ""
    fields: tuple[dataclasses.Field[Any], ...] = dataclasses.fields(kind)  # type: ignore[arg-type]
    return {
        "name": kind.name,
        "exactness": kind.exactness.value,
        "runs": WITH_BUDGET if kind in REDUCE else BY_NAME if kind in ON_REQUEST else ALWAYS,
        "removes": text.partition("\n")[0],
        "options": {option.name: repr(option.default) for option in fields},
    }
