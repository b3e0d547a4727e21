"""Which feature of which linear map stands where: index tensors run through the graph's views.

A linear's output is replaced by the integers 0, 1, 2... along its last axis (plus an offset for
each linear), and the ops after it move these integers as they would move the values. So fused
and interleaved projections, head splits, rotary slices and repeated heads all come out alike.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from redpass import ops
from redpass.analysis.flow import Flow, concrete

UNKNOWN = -1
DEFAULT_SIZE = 2
MOVES = ("repeat", "repeat_interleave", "flip", "roll", "index", "index_select", "broadcast_to")
"""Ops beside views that only move or repeat elements."""


class Tracer:
    """Runs index tensors through parts of one graph at small concrete sizes."""

    def __init__(self, flow: Flow) -> None:
        self.flow = flow
        dims = flow.program.signature.dims
        self.sizes = {name: max(low, DEFAULT_SIZE) for name, (low, _) in dims.items()}

    def shape(self, node: fx.Node) -> tuple[int, ...] | None:
        """The node's shape at the small sizes, or None when it has none or cannot be told."""
        sizes = self.flow.shape(node)
        if sizes is None:
            return None
        try:
            return tuple(concrete(size, self.sizes, DEFAULT_SIZE) for size in sizes)
        except (TypeError, ValueError):
            return None

    def source(self, node: fx.Node, start: int, axis: int = -1) -> Tensor | None:
        """Index tensor of a linear's output: `start`, `start + 1`... along `axis`."""
        shape = self.shape(node)
        if not shape:
            return None
        place = axis % len(shape)
        line = torch.arange(start, start + shape[place])
        sizes = [shape[place] if i == place else 1 for i in range(len(shape))]
        return line.reshape(sizes).expand(shape)

    def run(self, nodes: Iterable[fx.Node], seeds: Mapping[fx.Node, Tensor]) -> dict[fx.Node, Any]:
        """Carries `seeds` through `nodes` (any order); returns what each node holds."""
        known: dict[fx.Node, Any] = dict(seeds)
        for node in sorted(nodes, key=self.flow.order.__getitem__):
            if node in known or node.op != "call_function":
                continue
            try:
                value = self._step(node, known)
            except (RuntimeError, TypeError, ValueError, IndexError, KeyError):
                value = None
            if value is not None:
                known[node] = value
        return known

    def _step(self, node: fx.Node, known: Mapping[fx.Node, Any]) -> Any:
        operands = [a for a in node.all_input_nodes if a in known]
        if not operands:
            return None
        if getattr(node.target, "__name__", "") == "getitem":
            return known[operands[0]][node.args[1]]
        if ops.is_view(node):
            return self._view(node, known[operands[0]], operands[0])
        if ops.is_call(node, "cat", "stack"):
            return self._join(node, known)
        if ops.is_call(node, *MOVES):
            return self._call(node, known)
        return self._elementwise(node, known, operands)

    def _view(self, node: fx.Node, value: Tensor, operand: fx.Node) -> Any:
        if node.args[0] is not operand:
            return None
        shape = self.shape(node)
        if ops.is_call(node, "view", "reshape", "_unsafe_view", "flatten", "unflatten"):
            return value.reshape(shape) if shape else None
        if ops.is_call(node, "expand", "expand_as", "view_as"):
            return value.expand(shape) if shape else None
        return self._call(node, {operand: value})

    def _call(self, node: fx.Node, known: Mapping[fx.Node, Any]) -> Any:
        args = fx.node.map_arg(node.args, lambda n: self._argument(n, known))
        kwargs = fx.node.map_arg(node.kwargs, lambda n: self._argument(n, known))
        return node.target(*args, **kwargs)  # type: ignore[operator]

    def _argument(self, node: fx.Node, known: Mapping[fx.Node, Any]) -> Any:
        if node in known:
            return known[node]
        value = node.meta["val"]
        if isinstance(value, Tensor):
            table = None if value.is_floating_point() else self.flow.constant(node)
            if table is None:
                raise ValueError("a tensor that holds no indices")
            return table
        return concrete(value, self.sizes, DEFAULT_SIZE)

    def _join(self, node: fx.Node, known: Mapping[fx.Node, Any]) -> Any:
        """Joins index tensors; parts from elsewhere (cached positions) hold `UNKNOWN`."""
        parts: Any = node.args[0]
        filled = {}
        for part in parts:
            if part not in known:
                shape = self.shape(part)
                if shape is None:
                    return None
                filled[part] = torch.full(shape, UNKNOWN)
        return self._call(node, {**known, **filled})

    def _elementwise(
        self, node: fx.Node, known: Mapping[fx.Node, Any], operands: Sequence[fx.Node]
    ) -> Any:
        if not (self.flow.is_no_op(node) or ops.is_elementwise(node) or _keeps_places(node)):
            return None
        shape = self.shape(node)
        if ops.is_call(node, "view_as_complex", "view_as_real"):
            return known[operands[0]]
        if shape is not None and node.meta["val"].is_complex():
            shape = (*shape, 2)
        values = [known[a] for a in operands if isinstance(known[a], Tensor)]
        fitting = [v for v in values if shape is not None and v.shape == shape]
        if fitting:
            return fitting[0]
        return values[0].expand(shape) if values and shape else None


def _keeps_places(node: fx.Node) -> bool:
    return ops.is_call(node, "layer_norm", "rms_norm", "softmax", "view_as_complex", "view_as_real")


def compact(indices: Sequence[int]) -> Sequence[int]:
    """Returns equal indices as a `range` where they are evenly spaced, else as a tuple."""
    if len(indices) < 2:
        return tuple(indices)
    step = indices[1] - indices[0]
    even = step != 0 and all(b - a == step for a, b in itertools.pairwise(indices))
    if not even:
        return tuple(indices)
    return range(indices[0], indices[-1] + (1 if step > 0 else -1), step)
