"""Hidden layers: linears, elementwise ops, and the one linear that reads what they give.

    g = linear(x, Wg);  u = linear(x, Wu)        h = silu(g) * u        y = linear(h, Wd)

One channel of `h` depends on one row of each first matrix and meets one column of the second, so
channels can be cut or merged here without touching anything else.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import fx

from redpass import ops
from redpass.analysis.linears import Linear, Linears, linears
from redpass.facts import Facts
from redpass.program import Program


@dataclass(frozen=True)
class HiddenLayer:
    """One hidden layer.

    Attributes:
        first: the linears that compute the channels.
        nodes: the ops between, in graph order.
        vectors: the weights `[width]` these ops read, as nodes.
        second: the linear that reads the channels.
        obstacle: why channels cannot be changed here, or None.
    """

    first: tuple[Linear, ...]
    nodes: tuple[fx.Node, ...]
    vectors: tuple[fx.Node, ...]
    second: Linear
    obstacle: str | None

    @property
    def width(self) -> int:
        """How many channels there are."""
        return self.second.ins


def hidden_layers(program: Program, facts: Facts) -> tuple[HiddenLayer, ...]:
    """Finds every hidden layer, in the order of their second linears."""
    table = facts.get(linears)
    order = {node: place for place, node in enumerate(program.graph.nodes)}
    regions = (_Region(program, table, second) for second in table.by_node.values())
    return tuple(region.layer(order) for region in regions if region.first)


class _Region:
    """What lies above one linear, walked up until linears and weights."""

    def __init__(self, program: Program, table: Linears, second: Linear) -> None:
        self.program, self.table, self.second = program, table, second
        self.first: dict[str, Linear] = {}
        self.nodes: list[fx.Node] = []
        self.vectors: list[fx.Node] = []
        self.problems: list[str] = []
        pending = [program.nodes[second.input]]
        while pending:
            node = pending.pop()
            if node not in self.nodes:
                pending += self._visit(node)

    def _visit(self, node: fx.Node) -> list[fx.Node]:
        if node.name in self.table.by_node:
            self.first[node.name] = self.table.by_node[node.name]
        elif self._is_inside(node):
            self.nodes.append(node)
            return list(node.all_input_nodes)
        elif self._is_vector(node):
            self.vectors.append(node)
        elif not ops.is_size(node):
            self.problems.append(f"{node.name} is neither elementwise nor a linear")
        return []

    def _is_inside(self, node: fx.Node) -> bool:
        if not (ops.is_pure(node) and ops.is_float(node) and self._has_width(node)):
            return False
        if ops.is_call(node, *ops.RESHAPES):
            sizes = ops.argument(node, "size", "shape")
            return isinstance(sizes[-1], int)
        if any(ops.is_size(operand) for operand in node.all_input_nodes):
            return False
        return ops.is_elementwise(node) or ops.is_call(node, *ops.DROPOUTS, *ops.COPIES)

    def _has_width(self, node: fx.Node) -> bool:
        value = node.meta["val"]
        return bool(value.dim() > 1 and value.shape[-1] == self.second.ins)

    def _is_vector(self, node: fx.Node) -> bool:
        return node.op == "get_attr" and tuple(node.meta["val"].shape) == (self.second.ins,)

    def layer(self, order: dict[fx.Node, int]) -> HiddenLayer:
        first = tuple(self.first.values())
        nodes = tuple(sorted(self.nodes, key=order.__getitem__))
        obstacle = next(iter([*self.problems, *self._obstacles(first)]), None)
        return HiddenLayer(first, nodes, tuple(dict.fromkeys(self.vectors)), self.second, obstacle)

    def _obstacles(self, first: tuple[Linear, ...]) -> Iterator[str]:
        inside = {*(node.name for node in self.nodes), self.second.node}
        for name in (*(linear.node for linear in first), *(node.name for node in self.nodes)):
            if any(user.name not in inside for user in self.program.nodes[name].users):
                yield f"{name} is read elsewhere too"
        weights = [name for linear in first for name in linear.names]
        if shared := self.table.shared([*weights, self.second.weight]):
            yield f"the weight {shared} is read elsewhere too"
        if any(linear.outs != self.second.ins for linear in first):
            yield "a linear above has another width"
        if self.program.is_fake:
            yield "the weights carry no data"
