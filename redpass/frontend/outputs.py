"""Flattens what a forward returns to named tensors."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor


def flatten(result: Any) -> tuple[dict[str, Tensor], list[str]]:
    """Returns the tensors of a forward's result by name, and the names of what was left out.

    Names are keys of dicts and fields of dataclasses, joined by dots with positions in lists;
    values without a name are `output_0`, `output_1`, ... None is dropped silently.
    """
    found: dict[str, Tensor] = {}
    dropped: list[str] = []
    for path, value in _walk(result, ()):
        name = _name(path, len(found))
        if isinstance(value, Tensor):
            found[name] = value
        else:
            dropped.append(name)
    return found, dropped


def _name(path: tuple[str, ...], position: int) -> str:
    if path and not path[0].isdigit():
        return ".".join(path)
    return f"output_{position}" if len(path) <= 1 else "output_" + "_".join(path)


def _walk(value: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    if value is None:
        return
    for key, part in _parts(value):
        yield from _walk(part, (*path, key))
    if not _parts(value):
        yield path, value


def _parts(value: Any) -> list[tuple[str, Any]]:
    if isinstance(value, Mapping):
        return [(str(key), part) for key, part in value.items()]
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return list(zip(value._fields, value, strict=True))
    if isinstance(value, list | tuple):
        return [(str(index), part) for index, part in enumerate(value)]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [(f.name, getattr(value, f.name)) for f in dataclasses.fields(value)]
    return []
