"""Finds the configuration under which a library builds modules of other sizes.

Which number of a configuration is a width or a count of heads is found by trying, as the number of
layers is (`layouts`): a number is changed as a parameter's size changed, the model is built without
memory, and the change stays when some parameters fit that did not, and none the other way round.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from redpass.errors import ExportError

Shapes = Mapping[str, tuple[int, ...]]
Config = dict[str, Any]
Build = Callable[[Config], Shapes]
Place = tuple[Any, ...]
"""Keys that lead to a number of a configuration."""

Off = frozenset[tuple[str, int]]
"""Parameters and axes whose sizes are not what they are to be."""

WIDTHS = ("intermediate", "inner", "ffn", "mlp", "hidden_dim", "dim")
HEADS = "head"


def narrower(config: Config, wanted: Shapes, build: Build, *, by_heads: bool = True) -> Config:
    """Returns `config` with the numbers changed that give parameters the shapes of `wanted`.

    Only parameters that both have are looked at.

    Args:
        by_heads: whether fewer rows of an attention are first taken as fewer heads; else as
            narrower ones. Shapes alone do not always tell.

    Raises:
        ExportError: no number says it; names a parameter and its sizes.
    """
    found = build(config)
    while off := _off(found, wanted):
        for candidate in _candidates(config, found, wanted, off, by_heads):
            now = try_built(candidate, build)
            if now is not None and _off(now, wanted) < off and now.keys() == found.keys():
                config, found = candidate, now
                break
        else:
            raise _refused(found, wanted, off)
    return config


def _off(found: Shapes, wanted: Shapes) -> Off:
    return frozenset(
        (name, axis)
        for name in found.keys() & wanted.keys()
        for axis in range(max(len(found[name]), len(wanted[name])))
        if found[name][axis : axis + 1] != wanted[name][axis : axis + 1]
    )


def try_built(config: Config, build: Build) -> Shapes | None:
    """Returns the shapes that a configuration gives, or None where the library refuses it."""
    try:
        return build(config)
    except Exception:  # a library refuses a configuration that makes no sense in its own way
        return None


def _candidates(
    config: Config, found: Shapes, wanted: Shapes, off: Off, by_heads: bool
) -> Iterator[Config]:
    """Yields configurations with one number changed, likely ones first; then one layer's own."""
    pairs = sorted(
        {
            (found[name][axis], wanted[name][axis])
            for name, axis in off
            if axis < min(len(found[name]), len(wanted[name]))
        }
    )
    changes = dict.fromkeys(
        (place, new * value // old)
        for place, value in sorted(_numbers(config), key=lambda item: _rank(item[0], by_heads))
        for old, new in pairs
        if (value or old) and _may_say(place, value, old, new)
        for value in [old if value is None else value]
    )
    for place, value in changes:
        yield _with(config, place, value)
    layers = dict(config.get("per_layer_config") or {})
    number = min((_layer(name) for name, _ in off), key=lambda n: (len(n), n))
    for place, value in changes:
        if number and len(place) == 1:
            own = {**layers.get(number, {}), place[0]: value}
            yield {**config, "per_layer_config": {**layers, number: own}}


def _may_say(place: Place, value: int | None, old: int, new: int) -> bool:
    """Whether a number may be the width `old`, or how often something of a constant size is there.

    A width that is not given (None) is derived from others, and may be given instead.
    """
    key = str(next((part for part in reversed(place) if isinstance(part, str)), ""))
    if value is None:
        return any(word in key for word in WIDTHS)
    return value == old or (HEADS in key and value * new % old == 0 and value * new >= old)


def _rank(place: Place, by_heads: bool) -> tuple[int, int]:
    """Widths by their words first, then what says heads, then everything else."""
    key = str(next((part for part in reversed(place) if isinstance(part, str)), ""))
    if HEADS in key:
        return len(WIDTHS) + (("dim" in key) == by_heads), len(place)
    width = next((i for i, word in enumerate(WIDTHS) if word in key), len(WIDTHS) + 2)
    return width, len(place)


def _numbers(value: Any, path: Place = ()) -> Iterator[tuple[Place, int | None]]:
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, part in items:
        if isinstance(part, dict | list | tuple):
            yield from _numbers(part, (*path, key))
        elif part is None or type(part) is int:
            yield (*path, key), part


def _with(config: Config, place: Place, value: int) -> Config:
    result = copy.deepcopy(config)
    holder: Any = result
    for key in place[:-1]:
        holder[key] = list(holder[key]) if isinstance(holder[key], tuple) else holder[key]
        holder = holder[key]
    holder[place[-1]] = value
    return result


def _layer(name: str) -> str:
    """The first number in a parameter's name, or ""."""
    return next((part for part in name.split(".") if part.isdigit()), "")


def _refused(found: Shapes, wanted: Shapes, off: Off) -> ExportError:
    name = min(name for name, _ in off)
    numbers = {n: _layer(n) for n, _ in off}
    inner = name.replace(f".{numbers[name]}.", ".*.", 1)
    alike = [n for n in wanted if n.replace(f".{_layer(n)}.", ".*.", 1) == inner]
    shapes = {wanted[n] for n in alike}
    if len(shapes) > 1:
        return ExportError(
            f"has {len(shapes)} different shapes in {len(alike)} layers, and the library builds "
            "them all alike",
            place=inner,
            hint="cut all layers alike (prune_channels(together=True)), or use model.pt2 or "
            "model.onnx",
        )
    return ExportError(
        f"no number of the configuration gives it the shape {list(wanted[name])} in place of "
        f"{list(found[name])}",
        place=name,
        hint="model.pt2 and model.onnx hold the result",
    )
