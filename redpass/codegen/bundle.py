"""Puts the source of an op's modules into one text that imports torch and triton only.

Comments and layout stay as they were written: an emitted file is made to be read.
"""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

OWN = "redpass"
ALLOWED = frozenset(
    {"torch", "triton", "math", "collections", "functools", "typing", "dataclasses"}
)
"""What an emitted file may import."""


class UnbundledError(Exception):
    """Modules that cannot stand in one file: a fault of the op, found by its tests."""


@dataclass(frozen=True)
class Bundle:
    """Several modules as one.

    Attributes:
        imports: import statements, sorted, each once.
        parts: (module name, its text without docstring and imports), what is needed first first.
    """

    imports: tuple[str, ...]
    parts: tuple[tuple[str, str], ...]


def bundle(names: Iterable[str]) -> Bundle:
    """Collects modules, and those of redpass that they import.

    Raises:
        UnbundledError: two modules define one name, or one imports something not `ALLOWED`.
    """
    state = _State()
    for name in names:
        state.add(name)
    return Bundle(tuple(sorted(state.imports)), tuple(state.parts.items()))


@dataclass
class _State:
    imports: set[str] = field(default_factory=set)
    parts: dict[str, str] = field(default_factory=dict)
    defined: dict[str, str] = field(default_factory=dict)
    seen: set[str] = field(default_factory=set)

    def add(self, name: str) -> None:
        if name in self.seen:
            return
        self.seen.add(name)
        text = _source(name)
        tree, kept = ast.parse(text), []
        for statement in tree.body[1:] if ast.get_docstring(tree) is not None else tree.body:
            if isinstance(statement, ast.Import | ast.ImportFrom):
                self._import(statement, name)
            else:
                kept.append(statement)
                self._define(statement, name)
        self.parts[name] = "\n".join(_texts(text, tree.body, kept)).strip("\n")

    def _import(self, statement: ast.Import | ast.ImportFrom, place: str) -> None:
        if isinstance(statement, ast.ImportFrom):
            module = statement.module or ""
            if module == "__future__":
                return
            if module.split(".")[0] == OWN:
                if any(alias.asname for alias in statement.names):
                    raise UnbundledError(f"{place} renames what it imports from {module}")
                self.add(module)
                return
            roots = [module]
        else:
            roots = [alias.name for alias in statement.names]
        for root in roots:
            if root.split(".")[0] not in ALLOWED:
                raise UnbundledError(f"{place} imports {root}")
        self.imports.add(ast.unparse(statement))

    def _define(self, statement: ast.stmt, place: str) -> None:
        for name in _names(statement):
            if name in self.defined:
                raise UnbundledError(f"{place} and {self.defined[name]} both define {name}")
            self.defined[name] = place


def _source(name: str) -> str:
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise UnbundledError(f"there is no module {name}")
    return Path(spec.origin).read_text()


def _names(statement: ast.stmt) -> Iterator[str]:
    if isinstance(statement, ast.FunctionDef | ast.ClassDef):
        yield statement.name
    elif isinstance(statement, ast.Assign):
        for target in statement.targets:
            yield from (node.id for node in ast.walk(target) if isinstance(node, ast.Name))
    elif isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
        yield statement.target.id


def _texts(text: str, body: list[ast.stmt], kept: list[ast.stmt]) -> Iterator[str]:
    """The lines of each kept statement, with the comments above it and its decorators."""
    lines = text.split("\n")
    ends = [0] + [statement.end_lineno or 0 for statement in body]
    for statement, start in zip(body, ends, strict=False):
        if statement in kept:
            yield "\n".join(lines[start : statement.end_lineno])
