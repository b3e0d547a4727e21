"""A graph as text, one line a node: `%add:f32[batch,16] = add.Tensor(%x, %y)`."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, fx


def line(node: fx.Node) -> str:
    """Returns one node as text, stable from run to run."""
    if node.op == "placeholder":
        return f"%{node.name}{_type(node)} = input"
    if node.op == "get_attr":
        return f"%{node.name}{_type(node)} = weight {node.target}"
    if node.op == "output":
        return f"return {_argument(node.args[0])}"
    parts = [_argument(a) for a in node.args]
    parts += [f"{key}={_argument(value)}" for key, value in node.kwargs.items()]
    return f"%{node.name}{_type(node)} = {op_name(node.target)}({', '.join(parts)})"


def op_name(target: Any) -> str:
    """Returns a short stable name of a call target: `linear`, `add.Tensor`, `operator.add`."""
    if isinstance(target, torch._ops.OpOverload):
        name = str(target).removeprefix("aten.")
        return name.removesuffix(".default")
    module = getattr(target, "__module__", "") or ""
    return f"{module.lstrip('_')}.{getattr(target, '__name__', target)}"


def _argument(value: Any) -> str:
    if isinstance(value, fx.Node):
        return f"%{value.name}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_argument, value)) + "]"
    if isinstance(value, torch.dtype | torch.layout | torch.memory_format):
        return str(value).removeprefix("torch.")
    return str(value)


_SHORT = {"float": "f", "bfloat": "bf", "int": "i", "uint": "u", "bool": "b1", "complex": "c"}


def _type(node: fx.Node) -> str:
    value = node.meta.get("val")
    if not isinstance(value, Tensor):
        return ""
    name = str(value.dtype).removeprefix("torch.")
    stem = name.rstrip("0123456789")
    dims = ",".join(_size(size) for size in value.shape)
    return f":{_SHORT.get(stem, stem)}{name[len(stem) :]}[{dims}]"


def _size(size: int | torch.SymInt) -> str:
    return _expression(size.node.expr) if isinstance(size, torch.SymInt) else str(size)


@functools.lru_cache(maxsize=1 << 12)
def _expression(size: Any) -> str:
    """A size as text: printing took most of the time that naming a program takes."""
    return str(size).replace(" ", "")
