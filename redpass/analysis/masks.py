"""Whether a mask hides later positions: told by computing it at small sizes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from redpass import ops
from redpass.analysis.flow import Flow, concrete

BLOCKED = -1e4
POSITIONS = 5


class Masks:
    """Computes masks from made-up integer inputs; values are shared between masks."""

    def __init__(self, flow: Flow) -> None:
        self.flow = flow
        self.values: dict[fx.Node, Any] = {}
        self.verdicts: dict[tuple[fx.Node, bool], bool | None] = {}
        dims = flow.program.signature.dims
        self.sizes = {name: max(low, POSITIONS) for name, (low, _) in dims.items()}
        # No cached positions: then queries and keys are the same positions.
        self.sizes |= {name: 0 for name, (low, _) in dims.items() if low == 0}

    def is_causal(self, mask: fx.Node, *, fused: bool) -> bool | None:
        """Whether `mask` hides all later positions; None where it cannot be computed.

        Args:
            fused: a Boolean mask says True where attention is allowed (the fused op's rule);
                otherwise it may mean either.
        """
        if (mask, fused) not in self.verdicts:
            try:
                value = self._value(mask)
            except (RuntimeError, TypeError, ValueError, IndexError, KeyError):
                value = None
            verdict = None if value is None else _hides_later(value, fused)
            self.verdicts[mask, fused] = verdict
        return self.verdicts[mask, fused]

    def _value(self, mask: fx.Node) -> Tensor | None:
        for node in sorted(self._needed(mask), key=self.flow.order.__getitem__):
            if node not in self.values:
                self.values[node] = self._compute(node)
        found = self.values[mask]
        return found if isinstance(found, Tensor) else None

    def _needed(self, mask: fx.Node) -> set[fx.Node]:
        todo, seen = [mask], {mask}
        while todo:
            node = todo.pop()
            for arg in node.all_input_nodes:
                if arg not in seen and not _reads_shape_of(node, arg):
                    seen.add(arg)
                    todo.append(arg)
        return seen

    def _compute(self, node: fx.Node) -> Any:
        if node.op == "placeholder":
            return self._input(node)
        if node.op == "get_attr":
            weight = self.flow.program.weights[str(node.target)]
            if weight.is_meta:
                raise ValueError("a weight without data")
            return weight.detach()
        args = fx.node.map_arg(node.args, lambda arg: self._argument(node, arg))
        kwargs = fx.node.map_arg(node.kwargs, lambda arg: self._argument(node, arg))
        with torch.no_grad():
            return node.target(*args, **kwargs)  # type: ignore[operator]

    def _argument(self, node: fx.Node, arg: fx.Node) -> Any:
        if arg in self.values or not _reads_shape_of(node, arg):
            return self.values[arg]
        value = arg.meta["val"]
        return torch.zeros(self._shape(value), dtype=value.dtype)

    def _shape(self, value: Tensor) -> list[int]:
        return [concrete(size, self.sizes, POSITIONS) for size in value.shape]

    def _input(self, node: fx.Node) -> Tensor:
        """Integers count up from 1 along the last axis; other values must be empty."""
        value = node.meta["val"]
        shape = self._shape(value)
        if not value.is_floating_point():
            last = shape[-1] if shape else 1
            return torch.arange(1, last + 1).to(value.dtype).expand(shape).clone()
        if 0 in shape:
            return torch.zeros(shape, dtype=value.dtype)
        raise ValueError("the mask depends on floating-point inputs")


SHAPE_READERS = (
    "sym_size", "new_ones", "new_zeros", "new_full", "new_empty", "ones_like", "zeros_like",
    "full_like", "empty_like", "expand_as", "view_as",
)  # fmt: skip


def _reads_shape_of(node: fx.Node, arg: fx.Node) -> bool:
    """Whether `node` asks `arg` for its shape and dtype only."""
    place = 1 if ops.is_call(node, "expand_as", "view_as") else 0
    return ops.is_call(node, *SHAPE_READERS) and node.args[place] is arg


def _hides_later(mask: Tensor, fused: bool) -> bool | None:
    if mask.dim() < 2 or mask.shape[-1] != mask.shape[-2] or mask.shape[-1] < 2:
        return False if mask.dim() and 1 in mask.shape[-2:] else None
    is_bool = mask.dtype == torch.bool
    hidden = mask if is_bool else mask < BLOCKED
    later = torch.ones(hidden.shape[-2:], dtype=torch.bool).triu(1)
    upper, lower = hidden[..., later], hidden[..., ~later]
    if not is_bool:
        return bool(upper.all()) and not bool(lower.all())
    if bool(upper.any()):
        return not fused and bool(upper.all()) and not bool(lower.all())
    return bool(lower.any())
