"""`widths`: the dimensions of a program that can be made narrower, and the edits that do it.

A dimension (a hidden width, the channels of convolutions) lies in axes of weights and of values.
Leaving out units of it means: slices out of every weight that has it, and smaller sizes where a
call names them (views, splits, groups of a depthwise convolution). Which axes go together is what
`couplings` found; here is told whether cutting them keeps every op's meaning for what stays.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor, fx

from redpass import ops
from redpass.analysis.axes import Dimension, resolve
from redpass.analysis.couplings import BATCH_NORMS, Couplings
from redpass.analysis.experts import stack_of
from redpass.analysis.flow import Flow
from redpass.analysis.linears import count_readers, linears
from redpass.analysis.widths.resizing import CONVOLUTIONS, are_pieces_alike, resized
from redpass.facts import Facts
from redpass.plan import Edit, Narrow
from redpass.program import Program

CHANNELWISE = frozenset(
    {"max_pool1d", "max_pool2d", "avg_pool1d", "avg_pool2d", "adaptive_avg_pool1d",
     "adaptive_avg_pool2d", "upsample_nearest2d", "upsample_bilinear2d", "batch_norm", "mean",
     "sum", "amax", "linalg_vector_norm", "cat", "getitem", "embedding", "index", "select",
     "constant_pad_nd", "pad"}
)  # fmt: skip
"""Ops that treat each slice of an axis they keep by itself, beside elementwise ops and views."""


@dataclass(frozen=True)
class Holder:
    """A part of an axis of a weight that is the dimension; unit `u` has `block` slices there."""

    weight: str
    axis: int
    offset: int
    block: int


@dataclass(frozen=True)
class Reader:
    """A linear or a convolution that mixes the units.

    Attributes:
        node: the op.
        input: the node it reads.
        weight: its weight; `axis` is the one that meets the input's features.
        bias: a weight that takes up a constant added to its output, or "".
        sign: 1 where that is added to the output, -1 where it is subtracted (a running mean).
        parts: (offset, block) for each run of the axis that is the dimension.
    """

    node: str
    input: str
    weight: str
    axis: int
    bias: str
    sign: int
    parts: tuple[tuple[int, int], ...]

    def features(self, units: Tensor) -> Tensor:
        """Returns the places along the axis that belong to `units`, rising."""
        return torch.cat([_places(offset, block, units) for offset, block in self.parts]).sort()[0]


@dataclass(frozen=True, eq=False)
class Width:
    """A dimension that weights make and other weights read.

    Attributes:
        dimension: as in the couplings of the program.
        size: how many units it has.
        holders: everywhere in weights.
        readers: what mixes the units, in graph order.
        makers: nodes of the linears and convolutions that compute them.
        obstacle: why it cannot be cut, or "".
    """

    dimension: Dimension
    size: int
    holders: tuple[Holder, ...]
    readers: tuple[Reader, ...]
    makers: tuple[str, ...]
    obstacle: str


@dataclass(frozen=True)
class Widths:
    """All widths of a program, and the couplings they were read from."""

    found: tuple[Width, ...]
    couplings: Couplings = field(repr=False)


@dataclass(frozen=True)
class Repair:
    """What a reader's slices that stay take over: `spread` `[gone, kept]`, and `shift` `[gone]`."""

    spread: Tensor
    shift: Tensor | None = None


def widths(program: Program, facts: Facts) -> Widths:
    """Finds every dimension that some linear or convolution makes and some other one reads."""
    couplings = Couplings(Flow(program))
    search = _Search(program, facts, couplings)
    return Widths(tuple(search.widths()), couplings)


def narrow(
    found: Widths, width: Width, keep: Tensor, repairs: Mapping[str, Repair], program: Program
) -> Iterator[Edit]:
    """Yields the edits that leave only the units `keep` (rising) of a width.

    Args:
        repairs: weight of a reader -> what its slices that stay take over.
    """
    gone = torch.ones(width.size, dtype=torch.bool)
    gone[keep] = False
    units = gone.nonzero().flatten()
    read = {(reader.weight, reader.axis): reader for reader in width.readers}
    for (weight, axis), reader in read.items():
        lost, kept = reader.features(units), reader.features(keep)
        repair = repairs.get(weight)
        if repair is None:
            yield Narrow(weight, axis, lost)
            continue
        shift = None if repair.shift is None else reader.sign * repair.shift
        bias = "" if shift is None else reader.bias
        yield Narrow(weight, axis, lost, kept, repair.spread, bias, shift)
    for holder in width.holders:
        if (holder.weight, holder.axis) not in read:
            places = _places(holder.offset, holder.block, units)
            yield Narrow(holder.weight, holder.axis, places)
    for node in program.graph.nodes:
        yield from resized(node, found.couplings, {width.dimension: len(keep)})


def _places(offset: int, block: int, units: Tensor) -> Tensor:
    return (offset + units[:, None] * block + torch.arange(block)).flatten()


@dataclass(eq=False)
class _Search:
    """Sorts the axes of all nodes by their dimensions, and the nodes by what they do to them."""

    program: Program
    facts: Facts
    couplings: Couplings
    holders: dict[Dimension, list[Holder]] = field(default_factory=dict)
    uses: dict[Dimension, list[tuple[fx.Node, int]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.linears = self.facts.get(linears).by_node
        self.reads = count_readers(self.program)
        for node in self.program.graph.nodes:
            axes = self.couplings.axes.get(node)
            for axis, segments in enumerate(axes or () if not _is_list(node) else ()):
                self._sort(node, axis, segments)

    def _sort(self, node: fx.Node, axis: int, segments: object) -> None:
        offset = 0
        for segment in resolve(segments):  # type: ignore[arg-type]
            self.uses.setdefault(segment.dimension, []).append((node, axis))
            if node.op == "get_attr":
                holder = Holder(str(node.target), axis, offset, segment.block)
                self.holders.setdefault(segment.dimension, []).append(holder)
            offset += segment.length

    def widths(self) -> Iterator[Width]:
        for dimension, holders in self.holders.items():
            held = {(h.weight, h.axis) for h in holders}
            products = dict.fromkeys(
                user
                for name, _ in held
                for reader in self._node[name].users
                for user in (reader, *(reader.users if ops.is_call(reader, "index") else ()))
                if self._roles(user) is not None
            )
            readers = [r for node in products if (r := self._reader(node, holders))]
            makers = [n.name for n in products if self._makes(n, held)]
            if readers and makers:
                obstacle = self._obstacle(dimension, readers)
                order = sorted(readers, key=lambda r: self.couplings.flow.order[self._at(r.node)])
                yield Width(
                    dimension, dimension.size, tuple(holders), tuple(order), tuple(makers), obstacle
                )

    def _at(self, name: str) -> fx.Node:
        return self.program.nodes[name]

    @cached_property
    def _node(self) -> Mapping[str, fx.Node]:
        return {str(node.target): node for node in self.program.weight_nodes}

    @cached_property
    def _having(self) -> set[tuple[fx.Node, Dimension]]:
        return {(node, d) for d, uses in self.uses.items() for node, _ in uses}

    def _roles(self, node: fx.Node) -> tuple[str, int, int, bool] | None:
        """Weight, its axis of outputs and of inputs (-1 for a depthwise one), of a product."""
        if node.name in self.linears:
            linear = self.linears[node.name]
            return linear.weight, int(linear.transposed), 1 - int(linear.transposed), False
        if stack := stack_of(node):
            return stack, 1, 2, False
        weight = node.args[1] if ops.is_call(node, *CONVOLUTIONS) else None
        if not isinstance(weight, fx.Node) or weight.op != "get_attr":
            return None
        is_mixing = ops.argument(node, "groups") == 1
        return str(weight.target), 0, 1 if is_mixing else -1, not is_mixing

    def _makes(self, node: fx.Node, held: set[tuple[str, int]]) -> bool:
        roles = self._roles(node)
        return roles is not None and not roles[3] and (roles[0], roles[1]) in held

    def _reader(self, node: fx.Node, holders: list[Holder]) -> Reader | None:
        roles = self._roles(node)
        assert roles is not None
        weight, _, axis, _ = roles
        parts = tuple((h.offset, h.block) for h in holders if (h.weight, h.axis) == (weight, axis))
        if not parts:
            return None
        source = node.args[1] if ops.is_call(node, "addmm", "bmm") else node.args[0]
        assert isinstance(source, fx.Node)
        bias, sign = self._constant(node)
        return Reader(node.name, source.name, weight, axis, bias, sign, parts)

    def _constant(self, node: fx.Node) -> tuple[str, int]:
        """A weight, read here only, that takes up what is constant in the node's output."""
        if ops.is_call(node, *CONVOLUTIONS) and _is_padded(node):
            return "", 1  # at the border a constant input is none
        bias = node.args[0] if ops.is_call(node, "addmm") else None
        if bias is None and not ops.is_call(node, "matmul", "mm", "bmm"):
            bias = ops.argument(node, "bias")
        sign = 1
        if bias is None and len(node.users) == 1:
            user = next(iter(node.users))
            if ops.is_call(user, "batch_norm", *BATCH_NORMS) and user.args[0] is node:
                bias, sign = ops.argument(user, "running_mean"), -1
        if not isinstance(bias, fx.Node) or bias.op != "get_attr":
            return "", 1
        name = str(bias.target)
        return (name, sign) if self.reads[name] == 1 else ("", 1)

    def _obstacle(self, dimension: Dimension, readers: list[Reader]) -> str:
        if dimension.fixed:
            return dimension.fixed
        mixing = {reader.node for reader in readers}
        for node, axis in self.uses[dimension]:
            if why := self._why_not(node, axis):
                return why
            for user in node.users if node.op != "get_attr" else ():
                if _is_list(user) and not are_pieces_alike(user, self.couplings, dimension):
                    return f"{user.name} cuts it in equal parts"
                known = user.name in mixing or ops.is_size(user) or _is_list(user)
                if not known and (user, dimension) not in self._having:
                    return f"{user.name} mixes what it reads of it"
        return ""

    def _why_not(self, node: fx.Node, axis: int) -> str:
        if node.op == "get_attr":
            weight = self.program.weights[str(node.target)]
            return "" if weight.is_floating_point() else f"{node.target} is no table of floats"
        if node.op != "call_function":
            return f"{node.name} is a public input"
        if self._roles(node) is not None or ops.is_elementwise(node) or ops.is_view(node):
            return ""
        if ops.base_name(node) in CHANNELWISE or ops.is_call(node, *ops.DROPOUTS, *ops.COPIES):
            return ""
        if ops.is_call(node, *ops.CASTS):
            return ""
        if ops.is_call(node, "group_norm") and axis == 1:
            return ""
        rank = node.meta["val"].dim()
        if ops.is_call(node, "layer_norm", "rms_norm") and axis != rank - 1:
            return ""
        return f"{node.name} mixes its units or names its size in its own way"


def _is_padded(node: fx.Node) -> bool:
    padding = ops.argument(node, "padding")
    sizes = padding if isinstance(padding, list | tuple) else [padding]
    return any(size != 0 for size in sizes)


def _is_list(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), list | tuple)
