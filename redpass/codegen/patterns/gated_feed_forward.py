"""Gate, up, activation and product of a gated feed-forward layer.

%g = linear(%x, %gate)
%u = linear(%x, %up)              %y = redpass.gated_feed_forward(%x, %gate, %up, None, None, silu)
%s = silu(%g)              ->
%y = mul.Tensor(%s, %u)

Gate and up may be parts of one merged linear; the weights are then views of its weight.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from redpass import ops
from redpass.analysis.linears import new_name
from redpass.analysis.records import FeedForward, Projection
from redpass.analysis.structure import Structure
from redpass.codegen.patterns.site import Site, reader_outside
from redpass.plan import Ref, SetWeight, Skip, WeightRef
from redpass.program import Program

OP = "gated_feed_forward"
RULE = f"lower.{OP}"

ACTIVATIONS = ("silu", "relu", "sigmoid", "tanh", "gelu")
"""ATen ops that the kernel has as its activation."""

MAPS = ("linear", "mm", "matmul", "addmm")
CARRIERS = (*ops.VIEWS, *ops.COPIES, *ops.DROPOUTS)


def find(program: Program, structure: Structure) -> Iterator[Site | Skip]:
    """Yields every gated feed-forward whose two halves read one value."""
    order = {node: place for place, node in enumerate(program.graph.nodes)}
    for layer in structure.feed_forwards:
        if layer.gate is None:
            continue
        found = _read(program, layer, order)
        yield Skip(RULE, layer.inner, found) if isinstance(found, str) else found


@dataclass(frozen=True)
class _Half:
    """One projection: its linear, the rows of its weight, and whether they are stored as rows."""

    projection: Projection
    node: fx.Node
    rows: range

    def weight(self, program: Program) -> tuple[Any, tuple[SetWeight, ...]]:
        name = self.projection.weight
        stored = program.weights[name]
        is_whole = self.projection.axis == 0 and len(self.rows) == stored.shape[0]
        return _part(program, name, stored if self.projection.axis == 0 else stored.t(), self.rows,
                     whole=is_whole)  # fmt: skip

    def bias(self, program: Program) -> tuple[Any, tuple[SetWeight, ...]]:
        name = self.projection.bias
        if name is None:
            return None, ()
        stored = program.weights[name]
        return _part(program, name, stored, self.rows, whole=len(self.rows) == len(stored))


def _part(
    program: Program, name: str, stored: Tensor, rows: range, *, whole: bool
) -> tuple[Any, tuple[SetWeight, ...]]:
    if whole:
        return WeightRef(name), ()
    fresh = new_name(program, name, f"rows_{rows.start}_{rows.stop}")
    view = stored[rows.start : rows.stop]
    return WeightRef(fresh), (SetWeight(fresh, view, f"a part of {name}"),)


def _read(program: Program, layer: FeedForward, order: dict[fx.Node, int]) -> Site | str:
    product = program.nodes[layer.inner]
    halves = [_half(program, projection) for projection in (layer.gate, layer.up)]
    if any(half is None for half in halves):
        return "its rows are no one stretch of a weight"
    gate, up = (half for half in halves if half is not None)
    source = _source(gate.node)
    if source is None or source is not _source(up.node):
        return "gate and up read different values"
    inside, strangers = _between(product, source, order)
    if strangers:
        return f"'{strangers[0]}' stands between the projections and their product"
    acting = [node for node in inside if ops.is_call(node, *ACTIVATIONS)]
    if len(acting) != 1 or sum(ops.is_call(node, "mul") for node in inside) != 1:
        return "it is not one activation and one product"
    names = frozenset(node.name for node in inside)
    if read := reader_outside(program, names, (product.name,)):
        return f"'{read}' is read elsewhere too"
    if not _keeps_form(source, product, len(gate.rows)):
        return "its inner value has another shape or dtype than the input"
    return _site(program, product, source, (gate, up), activation_of(acting[0]), names)


def _half(program: Program, projection: Projection | None) -> _Half | None:
    if projection is None or len(projection.rows) != 1:
        return None
    rows = projection.rows[0]
    node = program.nodes[projection.node]
    if not isinstance(rows, range) or rows.step != 1 or projection.output != projection.node:
        return None
    return _Half(projection, node, rows) if ops.is_call(node, *MAPS) else None


def _source(node: fx.Node) -> fx.Node | None:
    operand = node.args[1 if ops.is_call(node, "addmm") else 0]
    return operand if isinstance(operand, fx.Node) else None


def _between(
    product: fx.Node, source: fx.Node, order: dict[fx.Node, int]
) -> tuple[list[fx.Node], list[str]]:
    """The nodes from `source` to `product`, and those among them that no kernel does."""
    todo, seen, strangers = [product], {product}, list[str]()
    while todo:
        node = todo.pop()
        known = (*MAPS, *ACTIVATIONS, *CARRIERS, "mul")
        if not ops.is_call(node, *known) and ops.base_name(node) != "getitem":
            strangers.append(node.name)
        for operand in node.all_input_nodes:
            is_end = operand is source or operand.op != "call_function" or ops.is_size(operand)
            if not is_end and operand not in seen and order[operand] > order[source]:
                seen.add(operand)
                todo.append(operand)
    return sorted(seen, key=order.__getitem__), strangers


def _keeps_form(source: fx.Node, product: fx.Node, width: int) -> bool:
    x, y = source.meta["val"], product.meta["val"]
    lead = [list(map(ops.expression, value.shape[:-1])) for value in (x, y)]
    return bool(lead[0] == lead[1] and y.shape[-1] == width and x.dtype == y.dtype)


def activation_of(node: fx.Node) -> str:
    """Returns the name that ops have for an activation in `ACTIVATIONS`."""
    name = ops.base_name(node)
    if name == "gelu" and ops.argument(node, "approximate") == "tanh":
        return "gelu_tanh"
    return name


def _site(
    program: Program,
    product: fx.Node,
    source: fx.Node,
    halves: tuple[_Half, _Half],
    activation: str,
    names: frozenset[str],
) -> Site:
    weights = [half.weight(program) for half in halves]
    biases = [half.bias(program) for half in halves]
    arguments = (Ref(source.name), *(item for item, _ in weights + biases), activation)
    fresh = {made.name: made for _, edits in weights + biases for made in edits}
    width = len(halves[0].rows)
    return Site(
        op=OP,
        results=(product.name,),
        arguments=arguments,
        before=product.name,
        covers=names,
        reason=f"{activation}(gate) * up of {width} channels of {source.name}",
        weights=tuple(fresh.values()),
    )
