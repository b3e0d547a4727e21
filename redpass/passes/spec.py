"""Pass specs: `drop_branches(min_similarity=0.9)` as text, and back.

A pass prints to its own spec, so a pipeline is a string that can be pasted into a bug report.
"""

from __future__ import annotations

import ast
from collections.abc import Sequence
from dataclasses import MISSING, Field, fields, replace
from typing import Any, get_args, get_origin, get_type_hints

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


def as_passes(passes: str | Sequence[Pass | str]) -> tuple[Pass, ...]:
    """Returns passes given as a spec, or as a row of passes and specs, their options checked.

    Raises:
        UsageError: what `parse_passes` raises, something that is no pass, or an option of another
            type than it takes.
    """
    rows = [passes] if isinstance(passes, str) else passes
    found = ((each,) if not isinstance(each, str) else parse_passes(each) for each in rows)
    return tuple(_checked(pass_) for row in found for pass_ in row)


def _checked(pass_: Any) -> Pass:
    """The pass with tuples where lists were given."""
    if isinstance(pass_, type) or not isinstance(pass_, Pass):
        hint = "give e.g. 'prune_channels(multiple=16)', or PruneChannels(multiple=16)"
        raise UsageError(f"{pass_!r} is no pass", hint=hint)
    if type(pass_) not in PASSES.values():
        return pass_
    given = {option.name: getattr(pass_, option.name) for option in _options(type(pass_))}
    lists = {name: tuple(value) for name, value in given.items() if isinstance(value, list)}
    for name, hint in _hints(type(pass_)).items():
        if not _is_of(lists.get(name, given[name]), hint):
            text = f"'{name}' takes {_words(hint)}, found {given[name]!r}"
            raise UsageError(text, place=pass_.name, hint=f"e.g. {name}={_example(hint)}")
    return replace(pass_, **lists) if lists else pass_  # type: ignore[type-var]


KINDS = {float: ("number", "0.5"), int: ("whole number", "8"), str: ("name", "'a'")}
"""Types of options: what they are called, and an example."""


def _hints(kind: type[Pass]) -> dict[str, Any]:
    found = get_type_hints(kind)
    return {option.name: found[option.name] for option in _options(kind)}


def _is_of(value: Any, hint: Any) -> bool:
    if get_origin(hint) is tuple:
        inner = get_args(hint)[0]
        return isinstance(value, tuple) and all(_is_of(each, inner) for each in value)
    if hint in (int, float):
        return not isinstance(value, bool) and isinstance(value, int | hint)
    return isinstance(value, hint)


def _words(hint: Any) -> str:
    if get_origin(hint) is tuple:
        return f"{KINDS[get_args(hint)[0]][0]}s"
    return f"a {KINDS[hint][0]}" if hint in KINDS else "True or False"


def _example(hint: Any) -> str:
    if get_origin(hint) is tuple:
        return f"({KINDS[get_args(hint)[0]][1]},)"
    return KINDS[hint][1] if hint in KINDS else "False"


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
    return _checked(kind(**{n: _literal(v, known[n]) for n, v in call.options.items()}))


def _literal(value: ast.expr, option: Field[Any]) -> Any:
    try:
        found = ast.literal_eval(value)
    except ValueError:
        found = ast.unparse(value)  # a bare word stands for itself: kinds=attention
    is_one = isinstance(_default(option), tuple) and not isinstance(found, tuple | list)
    return (found,) if is_one else found


def _options(kind: type[Pass]) -> tuple[Field[Any], ...]:
    return tuple(fields(kind))  # type: ignore[arg-type]


def _default(option: Field[Any]) -> Any:
    if option.default_factory is not MISSING:
        return option.default_factory()
    return None if option.default is MISSING else option.default
