"""Names for branches, for people: from module paths where they tell branches apart."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from torch import fx


def branch_labels(
    kinds: Sequence[str], paths: Sequence[str], layers: Sequence[int], streams: Sequence[int]
) -> list[str]:
    """Returns one unique label a branch: `layers.3.attention`.

    The numbers are those of the module paths (`encoder.layer.3` gives 3), so that a label stays
    the same when other branches have been dropped; they are the layers' own indices when the
    paths hold none or when different layers share them (shared weights).
    """
    numbers = _common(layers, [_numbers(path) for path in paths])
    places: dict[tuple[int, str], set[int]] = {
        (stream, number): set() for stream, number in zip(streams, numbers, strict=True)
    }
    for stream, number, layer in zip(streams, numbers, layers, strict=True):
        places[stream, number].add(layer)
    if any(not number for number in numbers) or any(len(p) > 1 for p in places.values()):
        numbers = [str(layer) for layer in layers]
    prefix = "stream{}." if len(set(streams)) > 1 else ""
    plain = [
        f"{prefix.format(stream)}layers.{number}.{kind}"
        for kind, number, stream in zip(kinds, numbers, streams, strict=True)
    ]
    return _numbered(plain)


def _common(layers: Sequence[int], numbers: list[str]) -> list[str]:
    """Cuts the numbers of a layer's branches to what they share: T5 counts branches too."""
    shared: dict[int, list[str]] = {}
    for layer, number in zip(layers, numbers, strict=True):
        parts = number.split(".")
        known = shared.setdefault(layer, parts)
        same = [a == b for a, b in zip(known, parts, strict=False)]
        shared[layer] = known[: [*same, False].index(False)]
    return [".".join(shared[layer]) for layer in layers]


def module_path(nodes: Sequence[fx.Node]) -> str:
    """The innermost module that all `nodes` were traced in, or "" when that is not known."""
    stacks = [_stack(node) for node in nodes]
    if not stacks or not all(stacks):
        return ""
    common = ""
    for level in zip(*stacks, strict=False):
        if len(set(level)) > 1:
            break
        common = level[0]
    return common


def _stack(node: fx.Node) -> list[str]:
    stack = node.meta.get("nn_module_stack") or {}
    return [str(entry[0]) for entry in stack.values()]


def _numbers(path: str) -> str:
    return ".".join(part for part in path.split(".") if part.isdigit())


def _numbered(labels: list[str]) -> list[str]:
    """Adds `.2`, `.3`... to labels that occurred before."""
    seen: Counter[str] = Counter()
    result = []
    for label in labels:
        seen[label] += 1
        result.append(label if seen[label] == 1 else f"{label}.{seen[label]}")
    return result
