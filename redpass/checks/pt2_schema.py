"""The types of a `.pt2`'s JSON, taken from the installed PyTorch without importing it.

`torch/_export/serde/schema.py` declares them as dataclasses with plain annotations. The file is
parsed as text, so JSON that PyTorch's reader would stumble over is refused before PyTorch is
loaded, by the types of the version that would read it.
"""

from __future__ import annotations

import ast
import importlib.util
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

SOURCE = Path("_export", "serde", "schema.py")
ROOT, WEIGHTS = "ExportedProgram", "PayloadConfig"
"""What `models/*.json` and the lists of weights hold."""

Type = str | tuple[str, "Type"]
"""A name, or `list`, `dict` (of text to it) or `optional` of a type."""

_FLOATS = ("Infinity", "-Infinity", "NaN")


@dataclass(frozen=True)
class Record:
    """A dataclass of the schema; of a union's fields exactly one is there."""

    fields: Mapping[str, Type]
    required: frozenset[str]
    is_union: bool


@dataclass(frozen=True)
class Schema:
    """Records by name, and the numbers that an enumeration knows."""

    records: Mapping[str, Record]
    numbers: Mapping[str, frozenset[int]]


@cache
def installed() -> Schema:
    """Returns the schema of the installed PyTorch, empty where it cannot be found or parsed."""
    spec = importlib.util.find_spec("torch")
    places = spec.submodule_search_locations if spec else None
    try:
        return parse(Path(next(iter(places or ()), ""), SOURCE).read_text())
    except (OSError, SyntaxError, ValueError):
        return Schema({}, {})


def parse(text: str) -> Schema:
    """Reads the classes of a schema file. Raises `SyntaxError`."""
    records: dict[str, Record] = {}
    numbers: dict[str, frozenset[int]] = {}
    for node in ast.parse(text).body:
        if not isinstance(node, ast.ClassDef):
            continue
        if any(ast.unparse(base).endswith("IntEnum") for base in node.bases):
            values = [part.value for part in node.body if isinstance(part, ast.Assign)]
            numbers[node.name] = frozenset(int(ast.literal_eval(value)) for value in values)
        else:
            records[node.name] = _record(node)
    return Schema(records, numbers)


def _record(node: ast.ClassDef) -> Record:
    parts = [part for part in node.body if isinstance(part, ast.AnnAssign)]
    return Record(
        {ast.unparse(part.target): _type(part.annotation) for part in parts},
        frozenset(ast.unparse(part.target) for part in parts if part.value is None),
        any("union" in ast.unparse(each).lower() for each in node.decorator_list),
    )


def _type(node: ast.expr) -> Type:
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.BinOp):
        return ("optional", _type(node.left))
    if not isinstance(node, ast.Subscript):
        return ast.unparse(node)
    kind = ast.unparse(node.value).lower()
    parts = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
    return _type(parts[0]) if kind == "annotated" else (kind, _type(parts[-1]))


def fault(value: Any, name: Type, schema: Schema | None = None) -> tuple[str, str]:
    """Says where JSON differs from a type, and how: two empty texts when it does not.

    Args:
        name: a record of the schema, such as `ROOT`.
        schema: the installed PyTorch's by default.
    """
    try:
        _Reader(schema or installed()).read(value, name, ())
    except _FaultError as found:
        return found.place, found.text
    return "", ""


class _FaultError(Exception):
    def __init__(self, path: tuple[str, ...], text: str) -> None:
        self.place, self.text = "".join(path).lstrip("."), text


@dataclass(frozen=True)
class _Reader:
    schema: Schema

    def read(self, value: Any, kind: Type, path: tuple[str, ...]) -> None:
        if isinstance(kind, tuple):
            self.read_many(value, *kind, path)
        elif kind in self.schema.records:
            self.read_record(value, self.schema.records[kind], path)
        elif kind in self.schema.numbers:
            if type(value) is not int or value not in self.schema.numbers[kind]:
                raise _FaultError(path, f"{_shown(value)} is no {kind}")
        elif kind in _PLAIN and not _PLAIN[kind](value):
            raise _FaultError(path, f"{_shown(value)} is no {kind}")

    def read_many(self, value: Any, kind: str, inner: Type, path: tuple[str, ...]) -> None:
        if kind == "optional":
            if value is not None:
                self.read(value, inner, path)
        elif kind == "list":
            if not isinstance(value, list):
                raise _FaultError(path, f"{_shown(value)} is no list")
            for number, part in enumerate(value):
                self.read(part, inner, (*path, f"[{number}]"))
        elif kind == "dict":
            if not isinstance(value, dict):
                raise _FaultError(path, f"{_shown(value)} is no object")
            for key, part in value.items():
                self.read(part, inner, (*path, f".{key}"))

    def read_record(self, value: Any, record: Record, path: tuple[str, ...]) -> None:
        if not isinstance(value, dict):
            raise _FaultError(path, f"{_shown(value)} is no object")
        if record.is_union and (len(value) != 1 or not value.keys() <= record.fields.keys()):
            wanted = ", ".join(list(record.fields)[:4])
            raise _FaultError(path, f"holds {_shown(sorted(value))}, not one of {wanted}, ...")
        lacks = () if record.is_union else record.required - value.keys()
        if lacks:
            raise _FaultError(path, f"has no '{min(lacks)}'")
        for key, kind in record.fields.items():
            if key in value and key != "as_none":  # which old versions wrote as a list
                self.read(value[key], kind, (*path, f".{key}"))


_PLAIN: Mapping[str, Callable[[Any], bool]] = {
    "str": lambda value: isinstance(value, str),
    "bool": lambda value: isinstance(value, bool),
    "int": lambda value: type(value) is int and -(2**63) <= value < 2**63,
    "float": lambda value: type(value) in (int, float) or value in _FLOATS,
}


def _shown(value: Any) -> str:
    """The value in few characters, numbers that JSON does not have as words."""
    if isinstance(value, float) and not math.isfinite(value):
        return repr(value)
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
