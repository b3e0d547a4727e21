"""What a user asks for in words, checked before PyTorch is imported.

Passes and their options are read off their source files, as text: importing them takes seconds, and
a typing mistake should not.
"""

from __future__ import annotations

import ast
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import redpass
from redpass.errors import UsageError, nearest

FORM = "write e.g. 'drop_noops,drop_branches(min_similarity=0.9)'"


@dataclass(frozen=True)
class Call:
    """One pass as a user writes it: its name, and the options given."""

    name: str
    options: Mapping[str, ast.expr]


@dataclass(frozen=True)
class Declared:
    """One pass as its source file declares it."""

    options: frozenset[str]
    exactness: str


def parse_calls(text: str, place: str = "--passes") -> list[Call]:
    """Parses a comma-separated list of passes; names are not looked at.

    Raises:
        UsageError: no such list, or an option without its name.
    """
    try:
        items = ast.parse(f"[{text}]", mode="eval").body.elts  # type: ignore[attr-defined]
    except (SyntaxError, ValueError, AttributeError, RecursionError, MemoryError) as error:
        raise UsageError(f"'{text}' is not a list of passes", place=place, hint=FORM) from error
    return [_call(item) for item in items]


def _call(item: ast.expr) -> Call:
    call = item if isinstance(item, ast.Call) else ast.Call(item, [], [])
    name = ast.unparse(call.func)
    if call.args or any(keyword.arg is None for keyword in call.keywords):
        raise UsageError("options are given by name", place=name, hint=f"{name}(option=value)")
    return Call(name, {str(keyword.arg): keyword.value for keyword in call.keywords})


def check_call(call: Call, known: Mapping[str, Collection[str]], place: str = "--passes") -> None:
    """Raises `UsageError` for an unknown pass or option, with the nearest known one.

    Args:
        known: name of each pass -> its options.
    """
    if call.name not in known:
        hint = nearest(call.name, known)
        raise UsageError(f"unknown pass '{call.name}'", place=place, hint=hint)
    options = known[call.name]
    for option in call.options:
        if option not in options:
            hint = nearest(option, options) if options else f"{call.name} has no options"
            raise UsageError(f"unknown option '{option}'", place=call.name, hint=hint)


def check_passes(text: str, place: str = "--passes") -> list[Declared]:
    """Returns what is declared of the passes in a list.

    Raises:
        UsageError: no list of passes, or an unknown pass or option.
    """
    known = declared()
    calls = parse_calls(text, place)
    for call in calls:
        check_call(call, {name: each.options for name, each in known.items()}, place)
    return [known[call.name] for call in calls]


@cache
def declared() -> Mapping[str, Declared]:
    """Returns every pass in `redpass/passes` by its name."""
    found: dict[str, Declared] = {}
    for file in sorted((Path(redpass.__file__).parent / "passes").glob("*.py")):
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef):
                found.update(_declared(node))
    return found


def _declared(node: ast.ClassDef) -> dict[str, Declared]:
    """The pass that a class is, by its name; nothing for another class."""
    fields = [part for part in node.body if isinstance(part, ast.AnnAssign)]
    parts = {ast.unparse(part.target): part for part in fields}
    if not {"name", "exactness"} <= parts.keys():
        return {}
    constants = {name for name, part in parts.items() if "ClassVar" in ast.unparse(part.annotation)}
    name, exactness = parts["name"].value, parts["exactness"].value
    if not isinstance(name, ast.Constant) or exactness is None:
        return {}
    kind = ast.unparse(exactness).rpartition(".")[2]
    return {str(name.value): Declared(frozenset(parts.keys() - constants), kind)}
