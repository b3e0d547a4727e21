"""Whether a `.pt2`'s graph fits itself: values are given before they are used, no weight lacks.

What is checked here was checked before against the schema, so that every key is where it should be.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

_WEIGHTS = ("parameter_name", "buffer_name", "tensor_constant_name")
_TENSORS = ("as_tensor", "as_tensors", "as_optional_tensor", "as_optional_tensors")


def fault(module: Any, weights: Collection[str]) -> str:
    """Says what does not fit in a `graph_module`, "" when all does.

    Args:
        weights: names of the weights and constants that the archive holds.
    """
    for spec in module["signature"]["input_specs"]:
        for holder in spec.values():
            for key in _WEIGHTS:
                if key in holder and holder[key] not in weights:
                    return f"the weight '{holder[key]}' is missing"
    return _unfit(module["graph"])


def _unfit(graph: Any) -> str:
    tensors = graph["tensor_values"]
    for name, meta in tensors.items():
        if len(meta["sizes"]) != len(meta["strides"]):
            return f"'{name}' has {len(meta['sizes'])} sizes and {len(meta['strides'])} strides"
    given: set[str] = set()
    for wanted, new in _steps(graph):
        for name, _ in _names(wanted):
            if name not in given:
                return f"'{name}' is used and nothing before gives it"
        for name, is_tensor in _names(new):
            if is_tensor and name not in tensors:
                return f"nothing says what '{name}' is"
            if name in given:
                return f"'{name}' is given twice"
            given.add(name)
    return _inner(graph)


def _steps(graph: Any) -> Iterator[tuple[Any, Any]]:
    """What is used and given: by the inputs, by each node, and by what is given back."""
    yield [], graph["inputs"]
    for node in graph["nodes"]:
        yield [entry["arg"] for entry in node["inputs"]], node["outputs"]
    yield graph["outputs"], []


def _inner(graph: Any) -> str:
    for node in graph["nodes"]:
        for entry in node["inputs"]:
            if "as_graph" in entry["arg"]:
                found = _unfit(entry["arg"]["as_graph"]["graph"])
                if found:
                    return found
    return ""


def _names(arguments: Any) -> Iterator[tuple[str, bool]]:
    """The values that arguments name, and whether each is a tensor."""
    for argument in arguments:
        for kind, value in argument.items():
            if kind == "as_string_to_argument":
                yield from _names(value.values())
            elif kind == "as_nested_tensors":
                yield from ((part["name"], True) for parts in value for part in parts)
            elif kind in _TENSORS or kind.startswith("as_sym"):
                for part in value if isinstance(value, list) else [value]:
                    yield from _named(part, is_tensor=kind in _TENSORS)


def _named(part: Any, *, is_tensor: bool) -> Iterator[tuple[str, bool]]:
    name = part.get("name") or part.get("as_name") or part.get("as_tensor", {}).get("name")
    if name:
        yield name, is_tensor
