"""Which of the source's parameters a result still reads, and with what values.

Read off the two graphs, the loaded one and the same with the approximate actions: a node that is
still there reads today's value of each parameter it read at the start. Names of weights play no
part, so a shared, refitted or renamed weight is found by who reads it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TypeGuard

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from redpass.errors import ExportError
from redpass.program import Program

HINT = "model.pt2 and model.onnx can hold such a result; drop whole layers for this form"


@dataclass(frozen=True)
class Surviving:
    """What is left of the source's parameters.

    Attributes:
        values: parameter that is still read -> its value now.
        gone: parameters that were read and no longer are.
    """

    values: Mapping[str, Tensor]
    gone: frozenset[str]


def surviving(source: Program, plain: Program) -> Surviving:
    """Compares what the nodes of two programs read.

    Args:
        source: the program as loaded; its weights carry the parameters' names.
        plain: the same with actions applied, nodes keeping their names.

    Raises:
        ExportError: `plain` computes something new, reads a weight where `source` reads none, or
            reads two values in the place of one parameter.
    """
    twins = _twins(source, plain)
    _refuse_new(plain, set(source.nodes) | {node.name for node in twins.values()})
    values: dict[str, Tensor] = {}
    seen: set[str] = set()
    for name, reader, place in _reads(source):
        seen.add(name)
        twin = twins.get(reader)
        if twin is None:
            continue
        _refuse_added(reader, twin)
        now = _value(plain, twin, place, name)
        if values.setdefault(name, now) is not now:
            text = "is one parameter in the source and has two values in the result"
            raise ExportError(text, place=name, hint=HINT)
    return Surviving(values, frozenset(seen - set(values)))


def _reads(source: Program) -> Iterator[tuple[str, fx.Node, int]]:
    """Yields parameter, reading node and the operand's place, for every read of a parameter."""
    for node in source.graph.nodes:
        if node.op != "call_function":
            continue
        for place, leaf in enumerate(_leaves(node)):
            if _is_weight(leaf):
                target = str(leaf.target)
                yield source.origin.parameters.get(target, target), node, place


def _leaves(node: fx.Node) -> list[object]:
    return pytree.tree_leaves((node.args, dict(node.kwargs)))


def _twins(source: Program, plain: Program) -> dict[fx.Node, fx.Node]:
    """Returns node -> the node that stands for it, for all that are left.

    A pass that gives a node other weights may put a new node in its place; such a node computes
    the same op on the same values and is named after the old one.
    """
    found = {n: plain.nodes[n.name] for n in source.graph.nodes if n.name in plain.nodes}
    new = [node for node in plain.graph.nodes if node.name not in source.nodes]
    for node in source.graph.nodes:
        if node not in found:
            alike = [other for other in new if _stands_for(other, node)]
            if len(alike) == 1:
                found[node] = alike[0]
    return found


def _stands_for(new: fx.Node, old: fx.Node) -> bool:
    if not new.name.startswith(f"{old.name}_") or new.target is not old.target:
        return False
    return _computed(new) == _computed(old)


def _computed(node: fx.Node) -> list[str]:
    return [operand.name for operand in node.all_input_nodes if operand.op != "get_attr"]


def _refuse_new(plain: Program, known: set[str]) -> None:
    for node in plain.graph.nodes:
        value = node.meta.get("val")
        if (
            node.op == "call_function"
            and node.name not in known
            and isinstance(value, torch.Tensor)
            and value.is_floating_point()
        ):
            text = "is computed by the result and by no module of the source"
            raise ExportError(text, place=node.name, hint=HINT)


def _refuse_added(old: fx.Node, new: fx.Node) -> None:
    before, after = (sum(map(_is_weight, _leaves(node))) for node in (old, new))
    if after > before:
        text = f"reads {after} weights where the source reads {before}: a bias was added"
        raise ExportError(text, place=old.name, hint=HINT)


def _value(plain: Program, twin: fx.Node, place: int, name: str) -> Tensor:
    leaves = _leaves(twin)
    leaf = leaves[place] if place < len(leaves) else None
    if not _is_weight(leaf):
        raise ExportError("is no weight any more in the result", place=name, hint=HINT)
    return plain.weights[str(leaf.target)]


def _is_weight(leaf: object) -> TypeGuard[fx.Node]:
    return isinstance(leaf, fx.Node) and leaf.op == "get_attr"
