"""Parsed JSON to records, every value checked against the field it is for."""

from __future__ import annotations

import math
import types
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")


def from_json(kind: type[T], data: Any) -> T:
    """Builds a record of class `kind` from parsed JSON.

    Raises:
        TypeError, ValueError: the data has not the fields of the class, or values of other kinds.
    """
    if not isinstance(data, Mapping):
        raise _misfit(data, kind.__name__)
    hints = get_type_hints(kind)
    names = [f.name for f in fields(kind) if f.name in data]  # type: ignore[arg-type]
    return kind(**{name: _value(hints[name], data[name]) for name in names})


def _value(hint: Any, value: Any) -> Any:
    if is_dataclass(hint):
        return from_json(hint, value)  # type: ignore[arg-type]  # a class, as hints hold
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        return _one_of(get_args(hint), value)
    if origin in (list, tuple):
        return _sequence(origin, get_args(hint), value)
    if origin in (dict, Mapping):
        return _mapping(get_args(hint), value)
    return _plain(hint, value)


def _one_of(kinds: tuple[Any, ...], value: Any) -> Any:
    if value is None and types.NoneType in kinds:
        return None
    for kind in kinds:
        try:
            return _value(kind, value)
        except (TypeError, ValueError):
            continue
    raise _misfit(value, " or ".join(getattr(kind, "__name__", str(kind)) for kind in kinds))


def _sequence(origin: Any, kinds: tuple[Any, ...], value: Any) -> Any:
    if not isinstance(value, list | tuple):
        raise _misfit(value, "list")
    if origin is list or kinds[-1] is Ellipsis:
        return origin(_value(kinds[0], item) for item in value)
    return tuple(_value(kind, item) for kind, item in zip(kinds, value, strict=True))


def _mapping(kinds: tuple[Any, ...], value: Any) -> dict[Any, Any]:
    if not isinstance(value, Mapping):
        raise _misfit(value, "object")
    return {_value(kinds[0], key): _value(kinds[1], item) for key, item in value.items()}


def _plain(hint: Any, value: Any) -> Any:
    if hint is Any:
        return value
    if hint is float and value is None:  # JSON has no NaN
        return math.nan
    wanted = (int, float) if hint is float else (hint,)
    if type(value) not in wanted:
        raise _misfit(value, hint.__name__)
    return value


def _misfit(value: Any, wanted: str) -> TypeError:
    return TypeError(f"found {str(value)[:80]!r} where {wanted} was expected")
