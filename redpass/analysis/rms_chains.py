"""RMS norms that were traced op by op: `x * rsqrt(mean(x²) + eps)` in its spellings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import fx

from redpass import ops
from redpass.facts import Facts
from redpass.program import Program


@dataclass(frozen=True)
class RmsChain:
    """One norm without its gain.

    Attributes:
        value: the node that is normed.
        mean: the node that averages the squares; over which axes is not checked.
        eps: what is added to the mean.
        inner: the nodes between, last to first.
    """

    value: fx.Node
    mean: fx.Node
    eps: float
    inner: tuple[fx.Node, ...]


def rms_chains(program: Program, facts: Facts | None = None) -> Mapping[str, RmsChain]:
    """Returns node that computes the normed value -> the chain, in graph order."""
    del facts
    found = ((node.name, _match(node)) for node in program.graph.nodes)
    return {name: chain for name, chain in found if chain}


def _match(node: fx.Node) -> RmsChain | None:
    """Reads `node` as `value * rsqrt(mean(value²) + eps)` or `value / sqrt(...)`."""
    if ops.is_call(node, "mul") and len(node.all_input_nodes) == 2:
        first, second = node.all_input_nodes
        return _root(first, second, reciprocal=True) or _root(second, first, reciprocal=True)
    if ops.is_call(node, "div") and len(node.all_input_nodes) == 2:
        value, root = node.all_input_nodes
        return _root(value, root, reciprocal=False)
    return None


def _root(value: Any, root: Any, *, reciprocal: bool) -> RmsChain | None:
    inner = [root]
    if reciprocal and ops.is_call(root, "reciprocal"):
        inner.append(root.args[0])
        reciprocal = False
    top = inner[-1]
    names = ("rsqrt", -0.5) if reciprocal else ("sqrt", 0.5)
    is_root = ops.is_call(top, str(names[0])) or (
        ops.is_call(top, "pow") and top.args[1] == names[1]
    )
    return _mean(value, inner, top.args[0]) if is_root else None


def _mean(value: fx.Node, inner: list[fx.Node], total: Any) -> RmsChain | None:
    if not (isinstance(total, fx.Node) and ops.is_call(total, "add") and not total.kwargs):
        return None
    mean, eps = total.args[:2]
    if not (isinstance(mean, fx.Node) and isinstance(eps, float) and ops.is_call(mean, "mean")):
        return None
    square = mean.args[0]
    if len(mean.args) < 2 or not isinstance(square, fx.Node) or not _is_square(square, value):
        return None
    return RmsChain(value, mean, eps, (*inner, total, mean, square))


def _is_square(node: fx.Node, value: fx.Node) -> bool:
    power = ops.is_call(node, "pow") and node.args[1] in (2, 2.0)
    itself = ops.is_call(node, "mul") and node.args[0] is node.args[1]
    return (power or itself or ops.is_call(node, "square")) and node.args[0] is value
