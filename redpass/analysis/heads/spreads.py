"""Heads that are taken from a value of fewer heads: which of its heads each one is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from redpass import ops
from redpass.analysis.provenance import MOVES, Tracer

HEADS = 1
"""The axis of the heads."""


@dataclass(frozen=True, eq=False)
class Spread:
    """A value of many heads that are taken from one of fewer.

    Attributes:
        source: the value of fewer heads.
        heads: which of its heads each head is.
        nodes: the nodes that spread them.
    """

    source: fx.Node
    heads: tuple[int, ...]
    nodes: tuple[fx.Node, ...]

    def over(self, count: int) -> tuple[int, ...]:
        """Which head of the source each of `count` readers reads, spread evenly in order."""
        return tuple(self.heads[reader * len(self.heads) // count] for reader in range(count))


def head_count(node: fx.Node) -> int:
    """Returns how many heads a value `[batch, heads, ...]` has."""
    return int(node.meta["val"].shape[HEADS])


def spread(tracer: Tracer, node: fx.Node) -> Spread | None:
    """Returns where the heads of a value come from: the value of fewest heads, itself if none.

    None where the number of heads is not fixed.
    """
    heads = node.meta["val"].shape[HEADS]
    if not isinstance(heads, int):
        return None
    found = Spread(node, tuple(range(heads)), ())
    passed: list[fx.Node] = []
    current: Any = node
    while isinstance(current, fx.Node) and (ops.is_view(current) or ops.is_call(current, *MOVES)):
        passed.append(current)
        current = current.args[0]
        moved = _moved(tracer, current, node, passed)
        if moved is not None and head_count(current) < head_count(found.source):
            found = Spread(current, moved, tuple(passed))
    return found


def _moved(
    tracer: Tracer, source: Any, node: fx.Node, passed: list[fx.Node]
) -> tuple[int, ...] | None:
    """Which head of `source` each head of `node` is; None when another axis is moved too."""
    value = source.meta.get("val") if isinstance(source, fx.Node) else None
    if not isinstance(value, torch.Tensor) or value.dim() != 4:
        return None
    heads: tuple[int, ...] | None = None
    for axis in range(4):
        labels = tracer.source(source, 0, axis)
        if labels is None:
            return None
        traced = tracer.run(passed, {source: labels}).get(node)
        if not isinstance(traced, torch.Tensor) or traced.dim() != 4:
            return None
        line = traced.movedim(axis, 0).flatten(1)
        if (line != line[:, :1]).any():
            return None
        found = tuple(line[:, 0].tolist())
        if axis == HEADS:
            heads = found
        elif found != tuple(range(labels.shape[axis])):
            return None
    return heads
