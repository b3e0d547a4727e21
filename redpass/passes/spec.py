"""Pass specs: `drop_branches(min_similarity=0.9)` as text, and back.

A pass prints to its own spec, so a pipeline is a string that can be pasted into a bug report.
"""

from __future__ import annotations

import ast
from collections.abc import Sequence
from dataclasses import MISSING, Field, fields
from typing import Any

from redpass.checks.requests import Call, check_call, parse_calls
from redpass.errors import UsageError
from redpass.passes import PASSES
from redpass.plan import Pass


def parse_passes(text: str) -> tuple[Pass, ...]:
    """Parses a comma-separated list of specs.

    Raises:
        UsageError: not a list of specs, or an unknown pass or option (nearest match named).
    """
    known = {name: [option.name for option in _options(kind)] for name, kind in PASSES.items()}
    calls = parse_calls(text)
    for call in calls:
        check_call(call, known)
    return tuple(map(_build, calls))


def format_pass(pass_: Pass) -> str:
    """Returns the spec of a pass: its name, and the options that differ from their defaults."""
    changed = [
        f"{option.name}={getattr(pass_, option.name)!r}"
        for option in _options(type(pass_))
        if getattr(pass_, option.name) != _default(option)
    ]
    return f"{pass_.name}({', '.join(changed)})" if changed else pass_.name


def format_passes(passes: Sequence[Pass]) -> str:
    """Returns the spec of several passes."""
    return ",".join(map(format_pass, passes))


def _build(call: Call) -> Pass:
    kind = PASSES[call.name]
    known = {option.name: option for option in _options(kind)}
    given = {name: _literal(value, known[name], call.name) for name, value in call.options.items()}
    return kind(**given)


def _literal(value: ast.expr, option: Field[Any], name: str) -> Any:
    try:
        found = ast.literal_eval(value)
    except ValueError:
        found = ast.unparse(value)  # a bare word stands for itself: kinds=attention
    default = _default(option)
    if isinstance(default, tuple) and not isinstance(found, tuple):
        found = (found,)
    fits = isinstance(found, type(default)) or (isinstance(default, float) and type(found) is int)
    if default is not None and not fits:
        kind = type(default).__name__
        raise UsageError(f"'{option.name}' takes a {kind}, found {found!r}", place=name)
    return found


def _options(kind: type[Pass]) -> tuple[Field[Any], ...]:
    return tuple(fields(kind))  # type: ignore[arg-type]


def _default(option: Field[Any]) -> Any:
    if option.default_factory is not MISSING:
        return option.default_factory()
    return None if option.default is MISSING else option.default
