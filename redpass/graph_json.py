"""A graph in core form as JSON and back, without running anything that the JSON names.

Calls are named as a `.pt2` names them and resolved from the same lists: ATen and `redpass::` ops,
and functions on sizes. Fake values are not in it: they follow from the inputs and the ops.
"""

from __future__ import annotations

import _operator
import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import fx

from redpass.checks.pt2_model import SIZE_TARGETS, is_known_target
from redpass.ops import SIZE_FUNCTIONS
from redpass.program import output_node

JSON = Any
_NAME = re.compile(r"[A-Za-z_]\w*")
_PLAIN = (str, int, bool, type(None))
_KINDS: dict[str, type] = {
    "dtype": torch.dtype,
    "layout": torch.layout,
    "memory_format": torch.memory_format,
}


def to_json(graph: fx.Graph) -> JSON:
    """Returns `graph`, with what its nodes say of where they come from.

    Raises:
        TypeError: it calls an op or holds a value that is not on the lists here.
    """
    texts: dict[str, int] = {}
    nodes = [_node(node, texts) for node in graph.nodes if node.op != "output"]
    return {"texts": list(texts), "nodes": nodes, "output": _value(output_node(graph).args[0])}


def from_json(data: JSON) -> fx.Graph:
    """Reads back what `to_json` gave.

    Raises:
        ValueError, KeyError, TypeError, IndexError, AttributeError: it is not that.
    """
    graph, nodes = fx.Graph(), dict[str, fx.Node]()
    for op, name, target, args, kwargs, *origin in data["nodes"]:
        if op not in ("placeholder", "get_attr", "call_function") or not _NAME.fullmatch(name):
            raise ValueError(f"no node of a program: {op} '{name}'")
        node = graph.create_node(
            op,
            _function(target) if op == "call_function" else _text(target),
            _read(args, nodes),
            _read(kwargs, nodes),
            name,
        )
        if node.name != name:
            raise ValueError(f"two nodes called '{name}'")
        node.meta.update(_meta(origin[0], origin[1], data["texts"]))
        nodes[name] = node
    graph.output(_read(data["output"], nodes))
    return graph


def _node(node: fx.Node, texts: dict[str, int]) -> list[JSON]:
    target = str(node.target) if node.op != "call_function" else _target(node.target)
    trace, stack = node.meta.get("stack_trace"), node.meta.get("nn_module_stack") or {}
    found = [node.op, node.name, target, _value(node.args), _value(dict(node.kwargs))]
    paths = [[key, path, _kind_name(kind)] for key, (path, kind) in stack.items()]
    return [*found, None if trace is None else texts.setdefault(trace, len(texts)), paths]


def _meta(trace: int | None, stack: list[list[str]], texts: list[str]) -> Iterator[tuple[str, Any]]:
    if trace is not None:
        yield "stack_trace", _text(texts[trace])
    if stack:
        yield "nn_module_stack", {_text(k): (_text(path), _text(kind)) for k, path, kind in stack}


def _kind_name(kind: Any) -> str:
    return kind if isinstance(kind, str) else f"{kind.__module__}.{kind.__qualname__}"


def _target(function: Any) -> str:
    named = isinstance(function, torch._ops.OpOverload)
    name = f"torch.ops.{function}" if named else _NAMES.get(function, str(function))
    if not is_known_target(name):
        raise TypeError(f"a call to {name}")
    return name


def _function(name: str) -> Callable[..., Any]:
    if name in _FUNCTIONS:
        return _FUNCTIONS[name]
    if not name.startswith("torch.ops.") or not is_known_target(name):
        raise ValueError(f"the operator '{name}' is not allowed")
    _, _, namespace, op, overload = name.split(".")
    found = getattr(getattr(getattr(torch.ops, namespace), op), overload)
    if not isinstance(found, torch._ops.OpOverload):
        raise ValueError(f"'{name}' is no operator")
    return found


def _named_functions() -> Iterator[tuple[str, Callable[..., Any]]]:
    """The functions on sizes by the names that a file gives them."""
    for name in SIZE_TARGETS:
        module, _, attribute = name.rpartition(".")
        found = getattr({"_operator": _operator, "math": math, "torch": torch}[module], attribute)
        if found in SIZE_FUNCTIONS or found is _operator.getitem:
            yield name, found


def _value(value: Any) -> JSON:
    """An argument as JSON: plain values as they are, everything else as `[kind, ...]`."""
    if type(value) in _PLAIN:
        return value
    if isinstance(value, fx.Node):
        return ["node", value.name]
    if type(value) is float:
        return value if math.isfinite(value) else ["float", str(value)]
    if isinstance(value, tuple | list):
        return ["tuple" if isinstance(value, tuple) else "list", *map(_value, value)]
    if isinstance(value, dict):
        return ["dict", *([_text(key), _value(part)] for key, part in value.items())]
    if isinstance(value, slice):
        return ["slice", *map(_value, (value.start, value.stop, value.step))]
    if isinstance(value, torch.device):
        return ["device", str(value)]
    for kind, known in _KINDS.items():
        if isinstance(value, known):
            return [kind, str(value).removeprefix("torch.")]
    raise TypeError(f"an argument of type {type(value).__name__}")


def _read(value: JSON, nodes: Mapping[str, fx.Node]) -> Any:
    if type(value) in (*_PLAIN, float):
        return value
    kind, *parts = value
    if kind in ("tuple", "list"):
        return (tuple if kind == "tuple" else list)(_read(part, nodes) for part in parts)
    if kind == "dict":
        return {_text(key): _read(part, nodes) for key, part in parts}
    if kind == "slice":
        return slice(*(_read(part, nodes) for part in parts))
    (name,) = parts
    if kind == "node":
        return nodes[name]
    if kind in _KINDS:
        found = getattr(torch, _text(name))
        if isinstance(found, _KINDS[kind]):
            return found
    elif kind == "device":
        return torch.device(_text(name))
    elif kind == "float" and name in ("inf", "-inf", "nan"):
        return float(name)
    raise ValueError(f"no argument of a call: {kind} {name!r}")


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    return value


_FUNCTIONS = dict(_named_functions())
_NAMES = {function: name for name, function in _FUNCTIONS.items()}
