"""Channels that compute the same: through batch norms, residual sums and gates, by couplings.

A channel depends on its slice of every weight that has the width and does not read it: filters,
biases, vectors of batch norms, depthwise filters, rows of gates. Where all are equal bit by bit,
so are the channels. Where one convolution (or linear) makes the width, a batch norm may follow, and
nothing but ReLU and ops that let factors through stands before the readers, channels whose
effective filters `gamma / sigma * [w, b - mean] + beta` are equal up to a positive factor are equal
up to that factor.

Source: iterative feature merging, Chen, Zhou and Yan 2024; here only what is exactly equal.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from redpass import ops
from redpass.analysis.axes import Segment, resolve
from redpass.analysis.batch_norms import BatchNorm
from redpass.analysis.channels import EXACT, POSITIVE
from redpass.analysis.couplings import BATCH_NORMS
from redpass.analysis.equal_rows import EqualRows
from redpass.analysis.experts import stack_of
from redpass.analysis.widths.narrowing import Holder, Reader, Repair, Width, Widths
from redpass.program import Program

LARGEST = 1 << 26
"""Numbers of a repair: 512 MiB in float64."""

LINEAR = frozenset(
    {"max_pool1d", "max_pool2d", "avg_pool1d", "avg_pool2d", "adaptive_avg_pool1d",
     "adaptive_avg_pool2d", "mean", "sum", "amax", "upsample_nearest2d", "batch_norm", "getitem"}
    | set(BATCH_NORMS)
)  # fmt: skip
"""Ops that let a positive factor of one channel through, or take it up (batch norms)."""


@dataclass(frozen=True, eq=False)
class EqualUnits:
    """Units that others stand for.

    Attributes:
        pairs: unit -> the one that stands for it.
        scales: what each unit is a multiple of its representative by, up to that one's own.
    """

    pairs: Mapping[int, int]
    scales: Tensor


def is_channels(program: Program, width: Width) -> bool:
    """Whether a convolution makes or reads the width."""
    if any(stack_of(program.nodes[reader.node]) for reader in width.readers):
        return False
    axes = ((h.weight, h.axis) for h in width.holders)
    return any(program.weights[weight].dim() > 2 and axis < 2 for weight, axis in axes)


def equal_units(
    program: Program, found: Widths, width: Width, norms: Mapping[str, BatchNorm]
) -> EqualUnits:
    """Finds the units of a width that compute the same.

    Args:
        found: all widths of the program.
        norms: layer that a batch norm follows -> the norm.
    """
    rows = EqualRows(width.size)
    chain = _chain(program, width, _values(found, width), norms)
    if chain is None:
        for holder in _makers(width):
            rows.add(_slices(program, holder, width), EXACT, 0.0)
    else:
        eps = torch.finfo(program.weights[str(_weight(program, width).target)].dtype).eps
        rows.add(chain, "positive", 4 * eps)
    return EqualUnits(rows.pairs(), rows.scales)


def _values(found: Widths, width: Width) -> list[fx.Node]:
    """The values that have a width, in graph order."""
    return [
        node
        for node, axes in found.couplings.axes.items()
        if node.op != "get_attr" and any(s.dimension is width.dimension for s in _segments(axes))
    ]


def _segments(axes: Any) -> Iterator[Segment]:
    """Everything that the axes of a value, or of the pieces of one, are made of."""
    for axis in axes or ():
        yield from _segments(axis) if isinstance(axis, list) else resolve(axis)


def _makers(width: Width) -> list[Holder]:
    read = {(reader.weight, reader.axis) for reader in width.readers}
    return [h for h in width.holders if (h.weight, h.axis) not in read]


def _slices(program: Program, holder: Holder, width: Width) -> Tensor:
    """`[units, numbers]` of one weight, float64."""
    weight = program.weights[holder.weight].movedim(holder.axis, 0)
    own = weight[holder.offset : holder.offset + width.size * holder.block]
    return own.reshape(width.size, -1).double()


def _weight(program: Program, width: Width) -> fx.Node:
    node = program.nodes[width.makers[0]]
    return next(a for a in node.all_input_nodes if a.op == "get_attr" and a.meta["val"].dim() > 1)


def _chain(
    program: Program, width: Width, nodes: Sequence[fx.Node], norms: Mapping[str, BatchNorm]
) -> Tensor | None:
    """Effective filters of the layer that makes the width, or None where factors matter."""
    if len(width.makers) != 1 or ops.is_call(
        maker := program.nodes[width.makers[0]], "addmm", "mm"
    ):
        return None
    norm = norms.get(maker.name)
    used = {maker, *(() if norm is None else (norm.node,))}
    weights = (a for node in used for a in node.all_input_nodes if a.op == "get_attr")
    allowed = {str(a.target) for a in weights}
    if not {h.weight for h in _makers(width)} <= allowed or any(
        h.block != 1 for h in _makers(width)
    ):
        return None
    if not all(node is maker or _lets_through(node, norm) for node in nodes):
        return None
    weight, bias = (ops.argument(maker, name) for name in ("weight", "bias"))
    if not isinstance(weight, fx.Node) or weight.op != "get_attr":
        return None
    matrix = program.weights[str(weight.target)].double()
    offset = None if bias is None else program.weights[str(bias.target)].double()
    if norm is not None:
        matrix, offset = norm.fold(maker, matrix, offset, program)
    rows = matrix.flatten(1)
    return rows if offset is None else torch.cat([rows, offset[:, None]], 1)


def _lets_through(node: fx.Node, norm: BatchNorm | None) -> bool:
    """Whether a positive factor of a channel comes out of it as it went in."""
    if ops.is_call(node, "batch_norm", *BATCH_NORMS):
        return norm is not None and node is norm.node
    if len([a for a in node.all_input_nodes if ops.is_float(a)]) != 1:
        return False
    known = (*ops.CASTS, *ops.COPIES, *ops.DROPOUTS, *LINEAR, *POSITIVE)
    return ops.is_view(node) or ops.base_name(node) in known


def merges(width: Width, found: EqualUnits, gone: Tensor, keep: Tensor) -> dict[str, Repair] | str:
    """Returns weight of a reader -> what its slices that stay take over; or why that is too much.

    Args:
        gone: units that go, `keep` those that stay, both rising.
    """
    repairs: dict[str, Repair] = {}
    for reader in width.readers:
        lost, stay = reader.features(gone), reader.features(keep)
        if len(lost) * len(stay) > LARGEST:
            return "too many places read its channels one by one"
        spread = torch.zeros(len(lost), len(stay), dtype=torch.float64)
        for row, column, factor in _entries(reader, found, gone):
            spread[torch.searchsorted(lost, row), torch.searchsorted(stay, column)] = factor
        repairs[reader.weight] = Repair(spread)
    return repairs


def _entries(
    reader: Reader, found: EqualUnits, gone: Tensor
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Places of lost slices, of those that take them over, and their factors."""
    kept = torch.tensor([found.pairs[unit] for unit in gone.tolist()])
    factor = found.scales[gone] / found.scales[kept]
    for offset, block in reader.parts:
        for inner in range(block):
            yield offset + gone * block + inner, offset + kept * block + inner, factor
