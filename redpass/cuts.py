"""Cutting slices out of weights, and adding what they did to the slices that stay."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from redpass.errors import PassError
from redpass.plan import Multiply, Narrow, ShrinkSizes


class Cuts:
    """The cuts that were done to some weights, in place in their table.

    Args:
        weights: name -> tensor; entries are replaced, tensors never written to.
    """

    def __init__(self, weights: dict[str, Tensor]) -> None:
        self.weights = weights
        self._left: dict[tuple[str, int], Tensor] = {}
        self._turned: set[tuple[str, int]] = set()

    def do(self, edit: Narrow) -> tuple[str, ...]:
        """Does one cut. Returns the names of the weights it changed.

        Raises:
            PassError: no such weight, or a place that is not there (any more).
        """
        for name in (edit.weight, edit.bias):
            if name and name not in self.weights:
                raise PassError("an edit names a weight that does not exist", place=name)
        weight = self.weights[edit.weight].movedim(edit.axis, 0)
        key = edit.weight, edit.axis % weight.dim()
        if key in self._turned:
            raise PassError("another action turned the axis that a cut is about", place=edit.weight)
        if edit.gone.dim() == 2:
            return self._do_each(edit, key)
        left = self._left.get(key, torch.arange(len(weight)))
        gone = _places(left, edit.gone, edit.weight)
        keep = torch.ones(len(left), dtype=torch.bool)
        keep[gone] = False
        if edit.bias and edit.shift is not None:
            self.weights[edit.bias] = _shifted(self.weights[edit.bias], weight[gone], edit.shift)
        if edit.spread is not None and edit.kept is not None:
            weight = _spread(weight, gone, _places(left, edit.kept, edit.weight), edit.spread)
        self.weights[edit.weight] = weight[keep].movedim(0, edit.axis).contiguous()
        self._left[key] = left[keep]
        return (edit.weight, edit.bias) if edit.bias else (edit.weight,)

    def _do_each(self, edit: Narrow, key: tuple[str, int]) -> tuple[str, ...]:
        """Cuts each slice of a weight's first axis at places of its own."""
        if key in self._left:
            raise PassError("another action took slices that a cut is about", place=edit.weight)
        parts = []
        for number, part in enumerate(self.weights[edit.weight]):
            alone = Cuts({"": part})
            kept, spread = (None if t is None else t[number] for t in (edit.kept, edit.spread))
            alone.do(Narrow("", key[1] - 1, edit.gone[number], kept, spread))
            parts.append(alone.weights[""])
        self.weights[edit.weight] = torch.stack(parts)
        self._turned.add(key)
        return (edit.weight,)

    def multiply(self, edit: Multiply) -> tuple[str, ...]:
        """Multiplies one axis of a weight. Returns the names of the weights it changed.

        Raises:
            PassError: no such weight, or its axis is not as long as it was any more.
        """
        for name in (edit.weight, edit.bias):
            if name and name not in self.weights:
                raise PassError("an edit names a weight that does not exist", place=name)
        old = self.weights[edit.weight]
        key = edit.weight, edit.axis % old.dim()
        weight = old.movedim(edit.axis, -1).double()
        if weight.shape[-1] != len(edit.matrix) or key in self._turned or key in self._left:
            raise PassError("another action changed the axis that a turn is about", place=key[0])
        self._turned.add(key)
        if edit.bias and edit.shift is not None:
            bias = self.weights[edit.bias]
            self.weights[edit.bias] = (bias.double() + weight @ edit.shift).to(bias.dtype)
        scaled = weight if edit.scale is None else weight * edit.scale
        turned = (scaled @ edit.matrix).movedim(-1, edit.axis)
        self.weights[edit.weight] = turned.to(old.dtype).contiguous()
        return (edit.weight, edit.bias) if edit.bias else (edit.weight,)


def _places(left: Tensor, wanted: Tensor, name: str) -> Tensor:
    """Where the original places `wanted` are among those that are left."""
    found = torch.searchsorted(left, wanted)
    if not torch.equal(left[found.clamp_max(len(left) - 1)], wanted):
        raise PassError("another action took slices of this weight that a cut is about", place=name)
    return found


def _spread(weight: Tensor, gone: Tensor, kept: Tensor, spread: Tensor) -> Tensor:
    """`weight` with `spread`ᵀ times its slices `gone` added to its slices `kept`."""
    lost = weight[gone].double().flatten(1)
    result = weight.clone()
    added = (spread.double().T @ lost).unflatten(1, weight.shape[1:]) if len(lost) else 0.0
    result[kept] = (weight[kept].double() + added).to(weight.dtype)
    return result


def _shifted(bias: Tensor, lost: Tensor, shift: Tensor) -> Tensor:
    """`bias` with the lost slices, weighted and summed over all axes but the outputs', added."""
    total = lost.double().flatten(2).sum(2) if lost.dim() > 2 else lost.double()
    return (bias.double() + shift.double() @ total).to(bias.dtype)


def shrink_sizes(node: fx.Node, edit: ShrinkSizes) -> None:
    """Takes numbers off the sizes that an argument of `node` is: a list, or one number.

    Raises:
        PassError: nothing would be left of a size.
    """
    at = edit.argument
    old: Any = node.args[at] if isinstance(at, int) else node.kwargs[at]
    sizes = old if isinstance(old, list | tuple) else [old]
    new = [size - by if by else size for size, by in zip(sizes, edit.by, strict=True)]
    if any(by and size < 1 for size, by in zip(new, edit.by, strict=True)):
        raise PassError(f"nothing is left of {sizes} less {list(edit.by)}", place=node.name)
    value = new if isinstance(old, list | tuple) else new[0]
    if isinstance(at, int):
        node.update_arg(at, value)
    else:
        node.update_kwarg(at, value)
