"""The residual stream: sums in which one term is an earlier value that the others are made from.

Nothing here knows attention or feed-forward: a skip connection is an add, seen through nested
adds, one of whose terms `x` is an ancestor of other terms that hold a learned linear map.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import fx

from redpass import ops
from redpass.analysis.flow import Flow


@dataclass(frozen=True, eq=False)
class Term:
    """One operand of a sum: its node, the add that reads it, and that add's other operand."""

    node: fx.Node
    join: fx.Node
    other: fx.Node


@dataclass(frozen=True, eq=False)
class Skip:
    """A skip connection: `root = entry + sum of terms`, all terms made from `entry`.

    Attributes:
        paths: for each term, the nodes from `entry` (not in it) to the term (in it).
    """

    entry: fx.Node
    root: fx.Node
    terms: tuple[Term, ...]
    paths: tuple[frozenset[fx.Node], ...]


def find_skips(flow: Flow) -> tuple[list[Skip], list[str]]:
    """Finds all skip connections in graph order, nested ones too, and notes on odd sums."""
    skips: list[Skip] = []
    notes: list[str] = []
    for node in flow.nodes:
        if is_sum(flow, node) and not _is_inner(flow, node):
            skip = _skip_at(flow, node)
            if skip is not None:
                skips.append(skip)
            elif _is_projection_shortcut(flow, node):
                notes.append(
                    f"{node.name}: both sides of the add hold learned maps (a projection "
                    "shortcut); it is no skip connection that can be dropped"
                )
    return skips, notes


def is_sum(flow: Flow, node: fx.Node) -> bool:
    """Whether `node` adds two float values of its own shape that depend on inputs."""
    if not ops.is_call(node, "add") or len(node.args) < 2 or node.kwargs.get("alpha", 1) != 1:
        return False
    operands = node.args[:2]
    return all(flow.is_live_float(a) for a in operands) and all(
        flow.shape(a) == flow.shape(node)  # type: ignore[arg-type]
        for a in operands
    )


def _is_inner(flow: Flow, node: fx.Node) -> bool:
    """Whether the sum is only read as a term of another sum."""
    while len(node.users) == 1:
        user = next(iter(node.users))
        if is_sum(flow, user) and user.args[0] is not user.args[1]:
            return True
        if not flow.is_no_op(user) or flow.shape(user) != flow.shape(node):
            return False
        node = user
    return False


def _terms(flow: Flow, add: fx.Node) -> Iterator[Term]:
    left, right = add.args[:2]
    for node, other in ((left, right), (right, left)):
        assert isinstance(node, fx.Node)
        assert isinstance(other, fx.Node)
        inner = node
        while flow.is_no_op(inner) and len(inner.users) == 1:
            inner = inner.all_input_nodes[0]
        if is_sum(flow, inner) and len(inner.users) == 1:
            yield from _terms(flow, inner)
        else:
            yield Term(node, add, other)


def _skip_at(flow: Flow, root: fx.Node) -> Skip | None:
    terms = list(_terms(flow, root))
    best: Skip | None = None
    for term in terms:
        entry = flow.peel(term.node)
        found = []
        for other in terms:
            path = flow.between(entry, other.node) if other is not term else frozenset()
            if any(is_learned(flow, node) for node in path):
                found.append((other, path))
        if found and (best is None or len(found) > len(best.terms)):
            found.sort(key=lambda pair: flow.order[pair[0].node])
            best = Skip(entry, root, tuple(t for t, _ in found), tuple(p for _, p in found))
    return best


def is_learned(flow: Flow, node: fx.Node) -> bool:
    """Whether the node maps a value that depends on inputs by a matrix of weights.

    An op nobody declared counts when it reads a weight of two or more dimensions: custom ops
    (grouped products of experts) are learned maps too.
    """
    if node.op != "call_function" or not ops.is_float(node):
        return False
    known = ops.is_call(node, *ops.LINEARS, "baddbmm", "einsum", "_grouped_mm", "addbmm")
    if not known and ops.namespace(node) in ("aten", ""):
        return False
    operands = node.all_input_nodes
    matrix = any(a not in flow.live and len(flow.shape(a) or ()) >= 2 for a in operands)
    return (matrix or _is_gathered(flow, node)) and any(flow.is_live_float(a) for a in operands)


def _is_gathered(flow: Flow, node: fx.Node) -> bool:
    """Whether an operand is rows picked out of a weight, as batched experts do."""
    for operand in node.all_input_nodes:
        source = operand
        while source.op == "call_function" and (ops.is_view(source) or flow.is_no_op(source)):
            source = source.all_input_nodes[0]
        if ops.is_call(source, "index", "index_select"):
            table = source.all_input_nodes[0]
            if table not in flow.live and len(flow.shape(table) or ()) >= 3:
                return True
    return False


def _is_projection_shortcut(flow: Flow, node: fx.Node) -> bool:
    terms = [flow.peel(term.node) for term in _terms(flow, node)]
    return all(_ends_in_map(flow, term) for term in terms)


def _ends_in_map(flow: Flow, node: fx.Node) -> bool:
    for _ in range(4):
        if ops.is_call(node, "conv1d", "conv2d", "conv3d", "linear", "addmm"):
            return is_learned(flow, node)
        if not ops.is_call(node, "batch_norm", "layer_norm", "group_norm", "permute", "relu"):
            return False
        node = flow.peel(node.all_input_nodes[0])
    return False


def outermost(skips: list[Skip], is_main: frozenset[fx.Node]) -> list[Skip]:
    """Keeps the skips that make up the stream.

    A skip inside another one's branch is a detail of that branch (a token shift, a gated mix),
    unless it jumps over one of `is_main` (attentions): then the outer one spans layers.
    """
    spanning = [s for s in skips if _spans_layers(skips, s, is_main)]
    kept = [s for s in skips if s not in spanning]
    inside: set[fx.Node] = set()
    found = []
    for skip in reversed(kept):
        if skip.root not in inside:
            found.append(skip)
        for path in skip.paths:
            inside |= path
    return found[::-1]


def _spans_layers(skips: list[Skip], outer: Skip, is_main: frozenset[fx.Node]) -> bool:
    path = frozenset().union(*outer.paths)
    inner = [s for s in skips if s is not outer and s.root in path]
    return any(p & is_main for s in inner for p in s.paths)


def chain(flow: Flow, skips: list[Skip]) -> list[list[Skip]]:
    """Groups skips into streams: each follows the nearest earlier one that its entry is made of."""
    by_root = {skip.root: skip for skip in skips}
    streams: list[list[Skip]] = []
    place: dict[Skip, list[Skip]] = {}
    for skip in skips:
        before = _nearest(flow, skip.entry, by_root)
        stream = place.get(before) if before is not None else None
        if stream is None:
            stream = []
            streams.append(stream)
        stream.append(skip)
        place[skip] = stream
    return streams


def _nearest(flow: Flow, entry: fx.Node, by_root: dict[fx.Node, Skip]) -> Skip | None:
    todo, seen, found = [entry], {entry}, []
    while todo:
        node = todo.pop()
        if node in by_root:
            found.append(node)
            continue
        fresh = [a for a in node.all_input_nodes if a not in seen and flow.is_live_float(a)]
        seen.update(fresh)
        todo.extend(fresh)
    return by_root[max(found, key=flow.order.__getitem__)] if found else None
