"""Values as rows of tokens: which axis holds the features, and which rows are padding."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from redpass import ops
from redpass.program import Program

FAR = 200
"""How many nodes are looked at for the op that tells which axis holds the features."""


class Tokens:
    """Turns values of one program into rows `[tokens, width]` without padding.

    Padding is what an integer or boolean input called a mask marks with 0. It belongs to a value
    whose positions it counts: the traced sizes say so, which tells an encoder's mask from a
    decoder's. A mask that also covers cached positions is cut to the last ones.
    """

    def __init__(self, program: Program) -> None:
        self.program = program
        names = [port.name for port in program.signature.inputs]
        inputs = dict(zip(names, program.inputs, strict=True))
        self._masks = {name: node for name, node in inputs.items() if _is_mask(name, node)}
        state = [inputs[name].meta["val"] for name, _ in program.signature.state]
        self._past = {symbol for value in state for symbol in _symbols(value.shape)}
        self._axes: dict[str, int] = {}
        self._ports: dict[str, str | None] = {}

    def width(self, name: str) -> int:
        """Returns how many features the value of node `name` has a token."""
        return int(self._sizes(name)[self._axis(name)])

    def form(self, name: str) -> tuple[Any, ...]:
        """Returns features and number of tokens, the latter as an expression over sizes.

        Values of equal form on one residual stream hold the same tokens, flattened or not.
        """
        sizes = self._sizes(name)
        width = sizes.pop(self._axis(name))
        return width, sympy.expand(sympy.prod(sizes))

    def rows(self, name: str, value: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
        """Returns the value of node `name` as `[tokens, width]`, padding left out.

        Args:
            inputs: all inputs of the program by port name.
        """
        heads = self._heads(name)
        whole = value if heads is None else value.movedim(heads, 2).flatten(2)
        moved = whole.movedim(self._axis(name), -1)
        flat = moved.reshape(-1, moved.shape[-1])
        port = self._port(name)
        if port is None:
            return flat
        kept = inputs[port] != 0
        length = moved.shape[1] if moved.dim() == 3 else len(flat) // max(len(kept), 1)
        kept = kept[:, max(kept.shape[1] - length, 0) :]
        return flat[kept.reshape(-1)] if kept.numel() == len(flat) else flat

    def _sizes(self, name: str) -> list[Any]:
        """The sizes as expressions, heads and their size as one."""
        sizes = [ops.expression(size) for size in self.program.nodes[name].meta["val"].shape]
        heads = self._heads(name)
        if heads is None:
            return sizes
        return [sizes[0], sizes[3 - heads], sizes[heads] * sizes[3]]

    def _heads(self, name: str) -> int | None:
        """The axis of the heads, where a value has one."""
        shape = self.program.nodes[name].meta["val"].shape
        if len(shape) != 4 or not isinstance(shape[3], int) or self._axis(name) != -1:
            return None
        fixed = [axis for axis in (1, 2) if isinstance(shape[axis], int)]
        return fixed[0] if len(fixed) == 1 else None

    def _axis(self, name: str) -> int:
        if name not in self._axes:
            self._axes[name] = feature_axis(self.program.nodes[name])
        return self._axes[name]

    def _port(self, name: str) -> str | None:
        """The mask input that counts the positions of the value, or None."""
        if name not in self._ports:
            found = (p for p, mask in self._masks.items() if self._fits(name, mask))
            self._ports[name] = next(found, None)
        return self._ports[name]

    def _fits(self, name: str, mask: fx.Node) -> bool:
        sizes = self._sizes(name)
        batch, length = (ops.expression(s) for s in mask.meta["val"].shape)
        if len(sizes) == 2:  # tokens flattened into one axis
            rest = sympy.expand(length - sizes[0] / batch)
            if rest == 0:
                return bool(length != 1)
        elif len(sizes) != 3 or self._axis(name) != -1 or sizes[0] != batch:
            return False
        else:
            rest = sympy.expand(length - sizes[1])
        return bool(rest == 0) or bool(_symbols([rest]) and _symbols([rest]) <= self._past)


def feature_axis(node: fx.Node) -> int:
    """Returns the axis of a value's features: 1 where convolutions read or make it, else the last.

    Asked of the nearest op, over elementwise ones, that knows: a convolution or a norm of
    channels, or a linear or a norm of the last axis.
    """
    value = node.meta["val"]
    if value.dim() < 3:
        return -1
    todo, seen = deque([node]), {node}
    while todo and len(seen) < FAR:
        current = todo.popleft()
        for near in (*current.users, *current.all_input_nodes):
            axis = _told_by(near, current)
            if axis is not None:
                return axis
            if near not in seen and ops.is_elementwise(near) and _dims(near) == value.dim():
                seen.add(near)
                todo.append(near)
        if _told_by(current, None) is not None:
            return _told_by(current, None) or -1
    return -1


CHANNELS_SECOND = ("conv1d", "conv2d", "conv3d", "convolution", "batch_norm", "group_norm")
CHANNELS_LAST = ("linear", "addmm", "matmul", "layer_norm", "rms_norm")


def _told_by(node: fx.Node, operand: fx.Node | None) -> int | None:
    """What an op that reads `operand` (or makes its own value, where None) says of the axis."""
    if operand is not None and operand not in node.args[:1]:
        return None
    if ops.is_call(node, *CHANNELS_SECOND):
        return 1
    return -1 if ops.is_call(node, *CHANNELS_LAST) else None


def _is_mask(name: str, node: fx.Node) -> bool:
    value = node.meta["val"]
    return "mask" in name and value.dim() == 2 and not value.dtype.is_floating_point


def _dims(node: fx.Node) -> int:
    value = node.meta.get("val")
    return value.dim() if isinstance(value, torch.Tensor) else -1


def _symbols(sizes: Any) -> set[Any]:
    return {s for size in sizes for s in getattr(ops.expression(size), "free_symbols", ())}
