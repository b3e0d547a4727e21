"""Running part of a program from values that are known, and telling which parts two programs share.

A changed program computes most of what the one it was made from does. `unchanged` says which
values; `Part` runs the rest from them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import fx

from redpass import half_precision
from redpass.fake import is_same_size
from redpass.plan import Ref
from redpass.program import Program


class Part:
    """The nodes of a program that make some values out of known ones.

    Args:
        wanted: names of the nodes whose values are asked for.
        known: names of nodes whose values may be given; those needed are in `needs`.

    Attributes:
        nodes: the nodes that are run, in order.
        needs: names of the values to give to `run`.
    """

    def __init__(self, program: Program, wanted: Iterable[str], known: Collection[str]) -> None:
        self._weights = program.weights
        self.wanted = tuple(wanted)
        found: set[fx.Node] = set()
        needs: set[str] = set()
        todo = [program.nodes[name] for name in self.wanted]
        while todo:
            node = todo.pop()
            if node.name in known or node.op == "placeholder":
                needs.add(node.name)
            elif node not in found:
                found.add(node)
                todo.extend(node.all_input_nodes)
        self.needs = frozenset(needs)
        self.nodes = tuple(node for node in program.graph.nodes if node in found)
        self._dead = self._last_uses()

    @property
    def calls(self) -> int:
        """How many operations a run does."""
        return sum(node.op == "call_function" for node in self.nodes)

    def _last_uses(self) -> dict[str, list[str]]:
        """For each node run, the values that nobody needs after it."""
        kept, dead = set(self.wanted), dict[str, list[str]]()
        for node in reversed(self.nodes):
            fresh = [a.name for a in node.all_input_nodes if a.name not in kept]
            dead[node.name] = fresh
            kept.update(fresh)
        return dead

    def run(self, values: Mapping[str, Any], keep: Collection[str] = ()) -> dict[str, Any]:
        """Returns the wanted values, and those named in `keep` that come up on the way.

        Args:
            values: node name -> value, at least of `needs`.
        """
        now = {name: values[name] for name in self.needs}
        found = {name: now[name] for name in self.wanted if name in now}
        also = set(keep) | set(self.wanted)
        with torch.no_grad():
            for node in self.nodes:
                now[node.name] = value = self._value(node, now)
                if node.name in also:
                    found[node.name] = value
                for name in self._dead[node.name]:
                    now.pop(name, None)
        return found

    def _value(self, node: fx.Node, now: Mapping[str, Any]) -> Any:
        if node.op == "get_attr":
            return self._weights[str(node.target)]
        args = fx.node.map_arg(node.args, lambda n: now[n.name])
        kwargs = fx.node.map_arg(node.kwargs, lambda n: now[n.name])
        return half_precision.call(node.target, args, kwargs)  # type: ignore[arg-type]


def unchanged(before: Program, after: Program) -> frozenset[str]:
    """Returns the names of the nodes of `after` that compute what they compute in `before`.

    The same operation on the same operands, all the way up to the same weights and inputs.
    """
    same: set[str] = set()
    for node in after.graph.nodes:
        old = before.nodes.get(node.name)
        if old is not None and _is_same(before, old, after, node, same):
            same.add(node.name)
    return frozenset(same)


def _is_same(
    before: Program, old: fx.Node, after: Program, new: fx.Node, same: Collection[str]
) -> bool:
    if old.op != new.op or old.target != new.target or new.op == "output":
        return False
    if new.op == "placeholder":
        return is_same_size(old.meta.get("val"), new.meta.get("val"))
    if new.op == "get_attr":
        return before.weights[str(old.target)] is after.weights[str(new.target)]
    if any(operand.name not in same for operand in new.all_input_nodes):
        return False
    return bool(_named(old) == _named(new))


def _named(node: fx.Node) -> Any:
    """The node's arguments with names in place of nodes."""

    def name_of(operand: fx.Node) -> Any:
        return Ref(operand.name)

    return fx.node.map_arg((node.args, dict(node.kwargs)), name_of)
