"""Finds the configuration under which a library builds a model without some of its modules.

Which number of a configuration counts the layers is found by trying: a number equal to the count
is lowered, the model is built without memory, and its parameters must be exactly those that are
left, renumbered. So no table of architectures is needed, and one that counts its layers twice, or
in several stages, is found the same way.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from redpass.errors import ExportError
from redpass.export.narrower import Build, Config, Shapes, narrower, try_built

LAYER_WORDS = ("layer", "block", "type", "pattern", "index")
"""Words in the names of lists that have one entry for each layer, or hold numbers of layers."""
SKIPS = (("attention",), ("mlp",), ("attention", "mlp"))
"""What `per_layer_config` can leave out of a layer (transformers pull request 45333)."""


@dataclass(frozen=True)
class ModuleList:
    """A numbered list of modules that loses some.

    Attributes:
        prefix: what its parameters' names begin with, before the number.
        count: how many modules it has.
        kept: the numbers that stay, in order.
    """

    prefix: str
    count: int
    kept: tuple[int, ...]

    def renamed(self, name: str) -> str | None:
        """Returns a parameter's name after renumbering, None when its module goes."""
        rest = name.removeprefix(f"{self.prefix}.")
        number, dot, inner = rest.partition(".")
        if rest == name or not number.isdigit():
            return name
        if int(number) not in self.kept:
            return None
        return f"{self.prefix}.{self.kept.index(int(number))}{dot}{inner}"


@dataclass(frozen=True)
class Layout:
    """A configuration, and what the source's parameters are called under it.

    Attributes:
        names: parameter of the source -> its name now; those that go are not in it.
    """

    config: Config
    names: Mapping[str, str]


def fit(
    config: Config, shapes: Shapes, gone: frozenset[str], build: Build, *, by_heads: bool = True
) -> Layout:
    """Returns the layout of a model that lost the parameters `gone`.

    Args:
        config: the source's configuration, all values spelt out.
        shapes: the source's parameters, with the shapes that they have now.
        build: gives the parameters of the model that a configuration describes; may raise.
        by_heads: see `narrower`.

    Raises:
        ExportError: no configuration says it; names what is in the way.
    """
    extra = build(config).keys() - shapes.keys()
    lists = shorter_lists(shapes, gone)
    for group in _alike(lists):
        config = _shortened(config, group, build)
    names = {name: new for name in shapes if (new := _renamed(name, lists)) is not None}
    parts = frozenset(names[name] for name in gone if name in names)
    wanted = {new: shapes[old] for old, new in names.items() if new not in parts}
    config = narrower(config, wanted, build, by_heads=by_heads)
    if parts:
        config = _without_parts(config, wanted, parts, build)
        names = {old: new for old, new in names.items() if new not in parts}
    found = build(config)
    if {name: shape for name, shape in found.items() if name not in extra} != wanted:
        raise ExportError("no configuration builds exactly the modules that are left")
    return Layout(config, names)


def shorter_lists(shapes: Shapes, gone: frozenset[str]) -> list[ModuleList]:
    """Returns the module lists that lose whole modules, outer lists before inner ones.

    A module goes when something it read is gone and nothing of it is read any more; parameters
    nobody ever read go with it.
    """
    members: dict[str, dict[int, list[str]]] = {}
    for name in shapes:
        parts = name.split(".")
        for place, part in enumerate(parts[:-1]):
            if part.isdigit():
                numbers = members.setdefault(".".join(parts[:place]), {})
                numbers.setdefault(int(part), []).append(name)
    lists: list[ModuleList] = []
    for prefix, numbers in sorted(members.items(), key=lambda item: item[0].count(".")):
        kept = tuple(n for n in sorted(numbers) if not set(numbers[n]) <= gone)
        inside_gone = _renamed(f"{prefix}.0.x", lists) is None
        if len(kept) < len(numbers) and not inside_gone:
            lists.append(ModuleList(prefix, max(numbers) + 1, kept))
    return lists


def _renamed(name: str, lists: Sequence[ModuleList]) -> str | None:
    """Renumbers from the inside out: inner prefixes hold the outer lists' old numbers."""
    found: str | None = name
    for item in reversed(lists):
        found = None if found is None else item.renamed(found)
    return found


def _alike(lists: Sequence[ModuleList]) -> list[list[ModuleList]]:
    """Groups lists that lose the same modules: one number may count them all."""
    groups: dict[tuple[int, tuple[int, ...]], list[ModuleList]] = {}
    for item in lists:
        groups.setdefault((item.count, item.kept), []).append(item)
    return list(groups.values())


def _shortened(config: Config, group: list[ModuleList], build: Build) -> Config:
    """Returns `config` with the lists of `group` as short as they are to be."""
    wanted = {item.prefix: len(item.kept) for item in group}
    for candidate in _candidates(config, group[0].count, group[0].kept):
        found = try_built(candidate, build)
        if found is not None and all(
            _length(found, prefix) == length for prefix, length in wanted.items()
        ):
            return candidate
    names = ", ".join(f"'{prefix}'" for prefix in wanted)
    raise ExportError(
        f"no number of the configuration says how many modules {names} has",
        hint="model.pt2 and model.onnx hold the result",
    )


def _length(shapes: Shapes, prefix: str) -> int:
    rests = (name.removeprefix(f"{prefix}.") for name in shapes if name.startswith(f"{prefix}."))
    numbers = {rest.partition(".")[0] for rest in rests}
    return len({number for number in numbers if number.isdigit()})


def _candidates(config: Config, count: int, kept: tuple[int, ...]) -> Iterator[Config]:
    """Yields configurations in which a number equal to `count` is lowered, likely ones first."""
    places = sorted(_places(config, count), key=lambda place: not _is_layer_word(place[-1]))
    for place in places:
        yield _lowered(config, [place], count, kept)
    if len(places) > 1:
        yield _lowered(config, [p for p in places if _is_layer_word(p[-1])], count, kept)


def _places(value: Any, count: int, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, part in items:
        if isinstance(part, dict | list | tuple):
            yield from _places(part, count, (*path, key))
        elif type(part) is int and part == count:
            yield (*path, key)


def _lowered(
    config: Config, places: list[tuple[Any, ...]], count: int, kept: tuple[int, ...]
) -> Config:
    result = copy.deepcopy(config)
    for place in places:
        holder: Any = result
        for key in place[:-1]:
            holder[key] = list(holder[key]) if isinstance(holder[key], tuple) else holder[key]
            holder = holder[key]
        holder[place[-1]] = len(kept)
        if isinstance(holder, dict):
            _cut_lists(holder, count, kept)
    return result


def _cut_lists(holder: Config, count: int, kept: tuple[int, ...]) -> None:
    """Cuts lists with an entry for each layer, renumbers lists and keys that name layers."""
    place = {old: new for new, old in enumerate(kept)}
    for key, value in holder.items():
        if not _is_layer_word(key):
            continue
        if isinstance(value, list | tuple) and len(value) == count:
            holder[key] = [value[number] for number in kept]
        elif isinstance(value, list | tuple) and _are_numbers(value, count):
            holder[key] = [place[number] for number in value if number in place]
        elif isinstance(value, dict) and _are_numbers([*map(_number, value)], count):
            holder[key] = {str(place[int(n)]): v for n, v in value.items() if int(n) in place}


def _is_layer_word(key: Any) -> bool:
    return isinstance(key, str) and any(word in key for word in LAYER_WORDS)


def _number(key: Any) -> Any:
    return int(key) if str(key).isdigit() else key


def _are_numbers(values: Sequence[Any], count: int) -> bool:
    return bool(values) and all(type(v) is int and 0 <= v < count for v in values)


def _without_parts(config: Config, wanted: Shapes, parts: frozenset[str], build: Build) -> Config:
    """Returns `config` with `per_layer_config` for layers that lose a part of themselves."""
    layers: dict[str, Any] = dict(config.get("per_layer_config") or {})
    for prefix in sorted({_layer_of(name) for name in parts}):
        number = prefix.rpartition(".")[2]
        mine = {name: shape for name, shape in wanted.items() if _layer_of(name) == prefix}
        for skip in SKIPS:
            entry = {**layers.get(number, {}), "skip": list(skip)}
            found = try_built({**config, "per_layer_config": {**layers, number: entry}}, build)
            if found and {n: s for n, s in found.items() if _layer_of(n) == prefix} == mine:
                layers[number] = entry
                break
        else:
            raise ExportError(_part_words(prefix, parts), place=prefix, hint=_PARTS)
    return {**config, "per_layer_config": layers}


_PARTS = "model.pt2 and model.onnx hold the result; drop whole layers for this form"


def _layer_of(name: str) -> str:
    """The outermost numbered module a parameter belongs to, else the parameter itself."""
    parts = name.split(".")
    place = next((i for i, part in enumerate(parts) if part.isdigit()), len(parts) - 1)
    return ".".join(parts[: place + 1])


def _part_words(prefix: str, parts: frozenset[str]) -> str:
    inner = {n.removeprefix(f"{prefix}.") for n in parts if n.startswith(f"{prefix}.")}
    lost = ", ".join(sorted({name.partition(".")[0] for name in inner})) or prefix
    return f"lost only a part ({lost}), and the library builds this model from whole layers only"
