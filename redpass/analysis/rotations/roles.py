"""What one node does to a dimension: commutes with turning it, maps into it, or out of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, fx

from redpass import ops
from redpass.analysis.axes import Dimension, resolve
from redpass.analysis.couplings import Couplings
from redpass.analysis.linears import Linear
from redpass.analysis.rotations.records import WRITES, Turn

MOVES = (*ops.CASTS, *ops.COPIES, *ops.DROPOUTS, "index", "index_select")
CONVOLUTIONS = ("conv1d", "conv2d", "conv3d")


class Roles:
    """Answers for one dimension of one program.

    Args:
        dimension: the stream's width, as in the couplings.
        linears: node name -> linear.
    """

    def __init__(
        self, couplings: Couplings, dimension: Dimension, linears: Mapping[str, Linear]
    ) -> None:
        self.couplings, self.dimension, self.linears = couplings, dimension, linears
        self.flow = couplings.flow

    def axis(self, node: Any) -> int | None:
        """The one axis of a value or weight that is the dimension, or None."""
        axes = self.couplings.axes.get(node) if isinstance(node, fx.Node) else None
        if not axes or isinstance(node.meta.get("val"), list | tuple) or not ops.is_float(node):
            return None
        places = [i for i, axis in enumerate(axes) if self._is_it(axis)]
        return places[0] if len(places) == 1 else None

    def is_last(self, node: fx.Node) -> bool:
        """Whether the dimension is the last axis of a value."""
        return self.axis(node) == int(node.meta["val"].dim()) - 1

    def _is_it(self, axis: Any) -> bool:
        found = resolve(axis)
        return len(found) == 1 and found[0].dimension is self.dimension and found[0].block == 1

    def operands(self, node: fx.Node) -> list[fx.Node] | None:
        """The values to turn so that `node` is turned alike; None where it does not commute."""
        axis = self.axis(node)
        if axis is None or node.op != "call_function":
            return None
        if ops.is_call(node, "add", "sub") and len(node.args) == 2:
            return self._having(node.args)
        if ops.is_call(node, "cat"):
            dim = int(node.args[1]) if len(node.args) > 1 else 0  # type: ignore[arg-type]
            return None if dim % node.meta["val"].dim() == axis else self._having(node.args[0])
        if ops.is_call(node, "mul", "div"):
            return self._scaled(node, axis)
        if ops.is_call(node, "neg", "mean", *MOVES) or ops.is_view(node):
            return self._having(node.args[:1])
        return None

    def moved(self, node: fx.Node) -> fx.Node | None:
        """The operand of a node that keeps constants too: moves, views, means over tokens."""
        if not (ops.is_call(node, "mean", *MOVES) or ops.is_view(node)):
            return None
        found = self.operands(node)
        return found[0] if found else None

    def _having(self, operands: Any) -> list[fx.Node] | None:
        nodes = list(operands)
        return nodes if all(self.axis(node) is not None for node in nodes) else None

    def _scaled(self, node: fx.Node, axis: int) -> list[fx.Node] | None:
        """The one operand of a product that has the dimension, if the other has one number for it.

        The gain of a layer (`layer_scale`) is told by `gain`.
        """
        left, right = node.args[:2]
        rank = node.meta["val"].dim()
        if self.axis(left) is not None and self._is_constant_along(right, axis - rank):
            return [left]  # type: ignore[list-item]
        other = self.axis(right) is not None and self._is_constant_along(left, axis - rank)
        return [right] if other and ops.is_call(node, "mul") else None  # type: ignore[list-item]

    def _is_constant_along(self, value: Any, axis: int) -> bool:
        if not isinstance(value, fx.Node):
            return isinstance(value, int | float)
        if ops.is_size(value):
            return True
        found = value.meta.get("val")
        if not isinstance(found, Tensor):
            return False
        return found.dim() < -axis or bool(found.shape[axis] == 1)

    def gain(self, node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
        """(value, gain) of a product of what one writer gives with a weight over the dimension."""
        if not ops.is_call(node, "mul") or len(node.args) != 2 or not self.is_last(node):
            return None
        for value, gain in (node.args, node.args[::-1]):
            if isinstance(gain, fx.Node) and gain.op == "get_attr" and self.is_last(gain):
                is_vector = gain.meta["val"].numel() == self.dimension.size
                if is_vector and isinstance(value, fx.Node) and self._is_written(value):
                    return value, gain
        return None

    def _is_written(self, node: fx.Node) -> bool:
        """Whether a value comes from one writer, and nothing else reads it on the way."""
        while len(node.users) == 1 and self.is_last(node):
            if next(self.writes(node), None) is not None:
                return True
            before = self.moved(node)
            if before is None:
                return False
            node = before
        return False

    def writes(self, node: fx.Node, gain: str = "") -> Iterator[Turn]:
        """Yields the axes to turn of the weights from which `node` computes its value."""
        axis, linear = self.axis(node), self.linears.get(node.name)
        if axis is None:
            return
        if linear is not None:
            yield Turn(linear.weight, node.name, int(linear.transposed), WRITES, gain)
            if linear.bias:
                yield Turn(linear.bias, node.name, 0, WRITES, gain)
        elif ops.is_call(node, "embedding") and _is_weight(node.args[0]):
            yield Turn(str(node.args[0].target), node.name, 1, WRITES, gain)  # type: ignore[union-attr]
        elif ops.is_call(node, *CONVOLUTIONS) and axis == 1:
            weight, bias = node.args[1], ops.argument(node, "bias")
            whole = ops.argument(node, "groups") == 1 and (bias is None or _is_weight(bias))
            if whole and _is_weight(weight):
                yield Turn(str(weight.target), node.name, 0, WRITES, gain)  # type: ignore[union-attr]
                if bias is not None:
                    yield Turn(str(bias.target), node.name, 0, WRITES, gain)


def _is_weight(node: Any) -> bool:
    return isinstance(node, fx.Node) and node.op == "get_attr"
