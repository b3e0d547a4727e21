"""The sizes that calls name: what they become when a dimension gets narrower."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import fx

from redpass import ops
from redpass.analysis.axes import Axis, Dimension, resolve
from redpass.analysis.couplings import Couplings
from redpass.plan import ShrinkSizes

SIZED = ("view", "reshape", "_unsafe_view", "expand")
"""Ops that name the sizes of all axes of their result."""

CONVOLUTIONS = ("conv1d", "conv2d", "conv3d")
GROUPS = 6
"""Place of a convolution's number of groups; of a group norm's it is 1."""


def resized(
    node: fx.Node, couplings: Couplings, sizes: Mapping[Dimension, int]
) -> Iterator[ShrinkSizes]:
    """Yields the edit that gives `node` its new sizes, if it names one that changes.

    Args:
        sizes: dimension -> how many units it has from now on.
    """
    at, new = _named(node, couplings, sizes)
    if at is None:
        return
    old: Any = node.args[at] if isinstance(at, int) else node.kwargs[at]
    pairs = zip(*(v if isinstance(v, list | tuple) else [v] for v in (old, new)), strict=True)
    by = tuple(0 if before is after else before - after for before, after in pairs)
    if any(by):
        yield ShrinkSizes(node.name, at, by)


def _named(
    node: fx.Node, couplings: Couplings, sizes: Mapping[Dimension, int]
) -> tuple[int | str | None, Any]:
    """Which argument names sizes (its place, or its name), and its new value; None for none."""
    axes = couplings.axes.get(node)
    if not axes or node.op != "call_function":
        return None, None
    if ops.is_call(node, *SIZED):
        return 1, _shape(node.args[1], axes, sizes)
    if ops.is_call(node, "split", "split_with_sizes") and isinstance(axes[0], list):
        return 1, _pieces(node, axes, sizes)
    if ops.is_call(node, *CONVOLUTIONS) and ops.argument(node, "groups") != 1:
        left = _groups(node, "groups", axes[1], sizes)
        return GROUPS if len(node.args) > GROUPS else "groups", left
    if ops.is_call(node, "group_norm"):
        return 1, _groups(node, "num_groups", axes[1], sizes)
    if ops.is_call(node, "layer_norm", "rms_norm"):
        named: Any = node.args[1]
        return 1, _shape(named, axes[-len(named) :], sizes)
    return None, None


def are_pieces_alike(node: fx.Node, couplings: Couplings, dimension: Dimension) -> bool:
    """Whether pieces that a call cuts equal stay so when `dimension` gets narrower."""
    pieces = couplings.axes.get(node)
    if not ops.is_call(node, "chunk", "split") or not pieces or not isinstance(pieces[0], list):
        return True
    forms = [
        [(s.block, s.dimension is dimension) for axis in piece for s in resolve(axis)]
        for piece in pieces
    ]
    return all(form == forms[0] for form in forms)


def _groups(node: fx.Node, name: str, axis: Axis, sizes: Mapping[Dimension, int]) -> int:
    """How many groups are left when whole ones go."""
    return int(ops.argument(node, name)) * length(axis, sizes) // length(axis, {})


def _shape(old: Any, axes: list[Axis], sizes: Mapping[Dimension, int]) -> list[Any]:
    """Sizes in which those of narrower axes are new; -1 and symbols stay."""
    pairs = zip(old, axes, strict=True)
    return [
        length(axis, sizes) if type(size) is int and size != -1 and axis else size
        for size, axis in pairs
    ]


def length(axis: Axis, sizes: Mapping[Dimension, int]) -> int:
    """Returns how many places an axis has when dimensions have the given sizes."""
    return sum(sizes.get(s.dimension, s.dimension.size) * s.block for s in resolve(axis))


def _pieces(node: fx.Node, axes: list[Any], sizes: Mapping[Dimension, int]) -> Any:
    dim = int(ops.argument(node, "dim")) % len(axes[0])
    new = [length(piece[dim], sizes) if piece[dim] else 1 for piece in axes]
    if isinstance(node.args[1], int):
        return new[0]  # the size of every piece but the last, and all get narrower alike
    return new
