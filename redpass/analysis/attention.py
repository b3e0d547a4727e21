"""Attention of a branch: projections, heads, rotary embedding, norms, scale, mask, cache."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor, fx

from redpass import ops
from redpass.analysis.cores import Core
from redpass.analysis.flow import Flow
from redpass.analysis.maps import LinearMap, back_to_maps, feature_axis, linear_map
from redpass.analysis.masks import Masks
from redpass.analysis.provenance import Tracer, compact
from redpass.analysis.records import Attention, Norm, Projection, StatePair
from redpass.analysis.rotary import find_rotary
from redpass.analysis.stream import is_learned

SHIFT = 32
"""An index tensor holds `map number << SHIFT | feature`."""


@dataclass(frozen=True, eq=False)
class Operand:
    """Queries, keys or values: the nodes back to the maps that made them, and their indices.

    Attributes:
        nodes: nodes from the maps (not in it) to the operand (in it), inputs on the way too.
        known: the nodes that hold indices, and what they hold.
        rows: for each head, the features that make it, as `map << SHIFT | feature`.
        maps: learned maps that end the walk, in order.
    """

    node: fx.Node
    nodes: frozenset[fx.Node]
    known: dict[fx.Node, Tensor]
    rows: tuple[tuple[int, ...], ...]
    maps: tuple[fx.Node, ...]


class Attentions:
    """Describes attention cores of one graph."""

    def __init__(self, flow: Flow, norms: Iterable[Norm]) -> None:
        self.flow = flow
        self.tracer = Tracer(flow)
        self.masks = Masks(flow)
        nodes = flow.program.nodes
        self.norms = {nodes[norm.output]: norm for norm in norms}
        state = flow.program.signature.state
        self.state = {flow.program.input_node(pair[0]): pair for pair in state}
        self.notes: list[str] = []

    def describe(self, core: Core, path: frozenset[fx.Node]) -> Attention:
        """Describes `core` as part of a branch whose nodes are `path`."""
        sizes = self.flow.shape(core.query) or (0,)
        query = self.operand(core.query, swapped=False)
        heads = len(query.rows) or self._heads_by_shape(core)
        key = self.operand(core.key, swapped=not core.is_fused)
        value = self.operand(core.value, swapped=False)
        output = self._output(core, path, heads)
        kv_heads = len(set(key.rows)) or heads
        rotary = find_rotary(self.flow, query.known, key.known)
        width = _integer(sizes[-1])
        return Attention(
            node=core.node.name,
            query=self._projection(query, "queries", core),
            key=self._projection(key, "keys", core),
            value=self._projection(value, "values", core),
            output=output,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=width,
            value_dim=_integer((self.flow.shape(core.value) or (0,))[-1]),
            grouping="MHA" if kv_heads == heads else "MQA" if kv_heads == 1 else "GQA",
            rotary=rotary,
            query_norm=self._norm(query),
            key_norm=self._norm(key),
            scale=self._scale(core, query, key),
            softcap=core.softcap,
            mask=core.masks[0].name if core.masks else None,
            causal=self._causal(core),
            is_cross=bool(key.maps) and not any(m in path for m in key.maps),
            key_of_head=sources_of_heads(key.rows, heads),
            key_cache=self._cache(key),
            value_cache=self._cache(value),
            nodes=frozenset(
                n.name
                for n in (query.nodes | key.nodes | value.nodes | core.nodes)
                if n in path and n in self.flow.live
            ),
        )

    def operand(self, node: fx.Node, *, swapped: bool) -> Operand:
        """Walks back from queries, keys or values; `swapped` where positions come last."""
        nodes, maps = back_to_maps(self.flow, node)
        seeds = {}
        for number, made in enumerate(maps):
            source = self.tracer.source(made, number << SHIFT, feature_axis(made))
            if source is not None:
                seeds[made] = source
        known = self.tracer.run(nodes, seeds)
        found = known.get(node)
        rows: tuple[tuple[int, ...], ...] = ()
        if isinstance(found, Tensor) and found.dim() >= 3:
            rows = _head_rows(found.transpose(-1, -2) if swapped else found)
        return Operand(node, frozenset(nodes), known, rows, maps)

    def _projection(self, operand: Operand, what: str, core: Core) -> Projection | None:
        used = {index >> SHIFT for row in operand.rows for index in row}
        if len(used) != 1 or min(used) < 0:
            names = ", ".join(made.name for made in operand.maps) or "no learned map"
            self.notes.append(f"{core.node.name}: its {what} are made by {names}")
            return None
        made = operand.maps[used.pop()]
        found = linear_map(self.flow, made)
        if found is None or found.weight is None:
            self.notes.append(f"{core.node.name}: its {what} come from {made.name}, no plain map")
            return None
        mask = (1 << SHIFT) - 1
        rows = tuple(compact([index & mask for index in row]) for row in operand.rows)
        return found.projection(found.out_axis, _distinct(rows))

    def _output(self, core: Core, path: frozenset[fx.Node], heads: int) -> Projection | None:
        found = self._reader(core.output, path)
        shape = self.tracer.shape(core.output)
        if found is None or found.weight is None or not shape or not heads:
            return None
        width = shape[-1]
        columns = self.tracer.source(core.output, 0)
        assert columns is not None
        lead = columns.reshape(-1, *shape[-2:])
        place = (_arange(lead) % heads).reshape(-1, 1, 1) * width
        seed = (lead + place).reshape(shape)
        known = self.tracer.run(path, {core.output: seed})
        read = known.get(found.source)
        rows: tuple[Sequence[int], ...] = ()
        if isinstance(read, Tensor):
            line = read.reshape(-1, read.shape[-1])[-1].tolist()
            columns_of: list[list[int]] = [[] for _ in range(heads)]
            for column in sorted(range(len(line)), key=line.__getitem__):
                if 0 <= line[column] < heads * width:
                    columns_of[line[column] // width].append(column)
            rows = tuple(map(compact, columns_of))
        return found.projection(found.in_axis, rows)

    def _reader(self, output: fx.Node, path: frozenset[fx.Node]) -> LinearMap | None:
        todo = [output]
        seen = set(todo)
        while todo:
            node = todo.pop(0)
            for user in sorted(node.users, key=self.flow.order.__getitem__):
                if user in seen or user not in path:
                    continue
                seen.add(user)
                if is_learned(self.flow, user):
                    return linear_map(self.flow, user)
                todo.append(user)
        return None

    def _heads_by_shape(self, core: Core) -> int:
        sizes = self.flow.shape(core.query) or ()
        return _integer(sizes[-3]) if len(sizes) >= 4 else 0

    def _norm(self, operand: Operand) -> str | None:
        found = [n for n in operand.known if n in self.norms]
        return found[-1].name if found else None

    def _scale(self, core: Core, *operands: Operand) -> float | None:
        scale = core.factor
        for node in {n for operand in operands for n in operand.known}:
            if scale is None or not ops.is_call(node, "mul", "div"):
                continue
            for factor in node.args[:2]:
                if not isinstance(factor, fx.Node) or self.flow.shape(factor) == ():
                    number = self.flow.scalar(factor)
                    scale = _times(scale, number, ops.is_call(node, "div"))
        return scale

    def _causal(self, core: Core) -> bool | None:
        if core.causal:
            return True
        verdicts = [self.masks.is_causal(mask, fused=core.is_fused) for mask in core.masks]
        if any(verdicts):
            return True
        return None if None in verdicts else False

    def _cache(self, operand: Operand) -> StatePair | None:
        found = [self.state[n] for n in operand.nodes if n in self.state]
        return found[0] if found else None


def _times(scale: float | None, number: float | None, is_divided: bool) -> float | None:
    if scale is None or not number:
        return None
    return scale / number if is_divided else scale * number


def _head_rows(indices: Tensor) -> tuple[tuple[int, ...], ...]:
    """The rows of one sequence: one a head, at the last position, without repeated batches."""
    lines = [tuple(row) for row in indices[..., -1, :].reshape(-1, indices.shape[-1]).tolist()]
    total = len(lines)
    for period in range(1, total + 1):
        if total % period == 0 and all(lines[i] == lines[i % period] for i in range(total)):
            break
    return tuple(lines[:period])


def sources_of_heads(rows: tuple[tuple[int, ...], ...], heads: int) -> tuple[int, ...]:
    """Returns which distinct row each head reads; fewer rows than heads repeat in blocks."""
    if not rows or heads % len(rows):
        return ()
    numbers: dict[tuple[int, ...], int] = {}
    found = [numbers.setdefault(row, len(numbers)) for row in rows]
    return tuple(found[head * len(rows) // heads] for head in range(heads))


def _distinct(rows: tuple[Sequence[int], ...]) -> tuple[Sequence[int], ...]:
    return tuple({tuple(row): row for row in rows}.values())


def _arange(like: Tensor) -> Tensor:
    return like.new_tensor(range(like.shape[0]))


def _integer(size: object) -> int:
    return size if isinstance(size, int) else 0
