"""State ports: what else gives the sizes a dropped one gave, and numbering those that are left."""

from __future__ import annotations

import operator
import re
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import sympy
import torch
from torch import fx

from redpass import ops
from redpass.errors import PassError
from redpass.program import Port, Program

_NUMBERED = re.compile(r"(?P<stem>\D+)(?P<number>\d+)(?P<rest>\D*)")


def renumber_state(program: Program) -> Program:
    """Returns the program with its numbered state counted from 0 without gaps.

    `past_key_values.3.key` is called `past_key_values.2.key` when one of the entries before it was
    dropped, as every runtime that fills the entries in order wants it. Names of another form, and
    those of programs without a gap, stay.
    """
    pairs = program.signature.state
    known = dict(_renumbered(name for name, _ in pairs)) | dict(_renumbered(n for _, n in pairs))
    if all(old == new for old, new in known.items()):
        return program

    def named(port: Port) -> Port:
        return replace(port, name=known.get(port.name, port.name))

    ports = program.signature
    signature = replace(
        ports,
        inputs=tuple(map(named, ports.inputs)),
        outputs=tuple(map(named, ports.outputs)),
        state=tuple((known[a], known[b]) for a, b in pairs),
    )
    return replace(program, signature=signature)


def _renumbered(names: Iterable[str]) -> list[tuple[str, str]]:
    """Each name with what it is to be called, where all of them hold one number."""
    known = list(names)
    parts = {name: _NUMBERED.fullmatch(name) for name in known}
    numbers: dict[str, set[int]] = {}
    for found in parts.values():
        if found is None:
            return [(name, name) for name in known]
        numbers.setdefault(found["stem"], set()).add(int(found["number"]))
    places = {
        stem: {number: place for place, number in enumerate(sorted(used))}
        for stem, used in numbers.items()
    }
    return [
        (name, f"{f['stem']}{places[f['stem']][int(f['number'])]}{f['rest']}")
        for name, f in parts.items()
        if f is not None
    ]


def size_expression(node: fx.Node) -> sympy.Expr | None:
    """Returns the expression of a symbolic size node, an integer as a constant, else None."""
    value = node.meta.get("val")
    if isinstance(value, torch.SymInt):
        return value.node.expr
    return sympy.Integer(value) if isinstance(value, int) else None


def resource_sizes(graph: fx.Graph, source: fx.Node) -> None:
    """Lets every size read off `source` be read off other inputs, or a difference of two.

    A cache entry can be dropped only when no size comes from it alone.

    Raises:
        PassError: a size that no other inputs give.
    """
    sizes = [user for user in source.users if ops.is_call(user, "sym_size")]
    for size in sizes:
        wanted = size_expression(size)
        with graph.inserting_before(_after_inputs(graph)):
            new = _find_size(graph, source, wanted)
            if new is None:
                raise PassError(f"no other input gives the size {wanted}", place=source.name)
        new.meta["val"] = size.meta["val"]
        size.replace_all_uses_with(new)
        graph.erase_node(size)


def _find_size(graph: fx.Graph, source: fx.Node, wanted: Any) -> fx.Node | None:
    sizes = [
        (node, axis, size.node.expr)
        for node in graph.nodes
        if node.op == "placeholder" and node is not source and not node.meta.get("dropped")
        for axis, size in enumerate(getattr(node.meta["val"], "shape", ()))
        if isinstance(size, torch.SymInt)
    ]
    for node, axis, expression in sizes:
        if expression == wanted:
            return graph.call_function(torch.ops.aten.sym_size.int, (node, axis))
    for node, axis, expression in sizes:
        for other, other_axis, subtracted in sizes:
            if sympy.simplify(expression - subtracted - wanted) == 0:
                return _difference(graph, (node, axis), (other, other_axis))
    return None


def _difference(graph: fx.Graph, left: tuple[fx.Node, int], right: tuple[fx.Node, int]) -> fx.Node:
    nodes = []
    for node, axis in (left, right):
        size = graph.call_function(torch.ops.aten.sym_size.int, (node, axis))
        size.meta["val"] = node.meta["val"].shape[axis]
        nodes.append(size)
    return graph.call_function(operator.sub, tuple(nodes))


def _after_inputs(graph: fx.Graph) -> fx.Node:
    last: fx.Node = [node for node in graph.nodes if node.op == "placeholder"][-1]
    return last.next
