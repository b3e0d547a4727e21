"""Batch norms with stored statistics, the layer beside each, and what the two are together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from redpass import ops
from redpass.facts import Facts
from redpass.program import Program

LAYERS = ("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "linear")


@dataclass(frozen=True)
class BatchNorm:
    """A batch norm and the convolution or linear whose value it norms, or that reads its value.

    Attributes:
        node: the norm.
        result: the node that has the normed value: `node`, or what takes it out of a tuple.
        layer: the layer, or None when neither neighbour is one.
        follows: whether the norm comes after the layer.
    """

    node: fx.Node
    result: fx.Node
    layer: fx.Node | None
    follows: bool

    @property
    def is_training(self) -> bool:
        """Whether it reads the statistics of the batch."""
        return ops.is_call(self.node, "batch_norm") and bool(ops.argument(self.node, "training"))

    def operands(self, node: fx.Node, *names: str) -> tuple[str | None, ...]:
        """Returns the names of the weights `node` takes as these arguments."""
        found = [ops.argument(node, name) for name in names]
        return tuple(None if weight is None else str(weight.target) for weight in found)

    def affine(self, program: Program) -> tuple[Tensor, Tensor]:
        """Returns factor and shift of each channel in float64: `y = x * factor + shift`."""
        names = self.operands(self.node, "weight", "bias", "running_mean", "running_var")
        gain, bias, mean, variance = (_double(name, program) for name in names)
        if mean is None or variance is None:
            raise ValueError("a batch norm without stored statistics is no affine map")
        factor = torch.rsqrt(variance + ops.argument(self.node, "eps"))
        factor = factor if gain is None else factor * gain
        return factor, (0 if bias is None else bias) - mean * factor

    def fold(
        self, layer: fx.Node, weight: Tensor, bias: Tensor | None, program: Program
    ) -> tuple[Tensor, Tensor]:
        """Returns weight and bias, in float64, of a layer that does what both do together.

        Args:
            weight: what stands for the layer's own weight, in float64.
            bias: the same for its bias.
        """
        factor, shift = self.affine(program)
        return (_after if self.follows else _before)(layer, weight, bias, factor, shift)


def batch_norms(program: Program, facts: Facts | None = None) -> tuple[BatchNorm, ...]:
    """Finds every batch norm, each with the layer before it, or else the one after it."""
    del facts
    return tuple(norm for node in program.graph.nodes if (norm := _read(node)))


def _read(node: fx.Node) -> BatchNorm | None:
    result = node
    if ops.is_call(node, "_native_batch_norm_legit_no_training"):
        used = [user for user in node.users if user.users]
        if len(used) != 1 or used[0].args[1:] != (0,):
            return None
        result = used[0]
    elif not ops.is_call(node, "batch_norm"):
        return None
    before, after = node.args[0], next(iter(result.users), None)
    if not _is_layer(before) and isinstance(after, fx.Node) and _is_layer(after):
        return BatchNorm(node, result, after, follows=False)
    layer = before if isinstance(before, fx.Node) and _is_layer(before) else None
    return BatchNorm(node, result, layer, follows=True)


def _is_layer(node: Any) -> bool:
    if not isinstance(node, fx.Node) or not ops.is_call(node, *LAYERS) or node.kwargs:
        return False
    weight, bias = ops.argument(node, "weight"), ops.argument(node, "bias")
    if not isinstance(weight, fx.Node):
        return False
    return weight.op == "get_attr" and (bias is None or bias.op == "get_attr")


def _double(name: str | None, program: Program) -> Tensor | None:
    return None if name is None else program.weights[name].double()


def _after(
    layer: fx.Node, weight: Tensor, bias: Tensor | None, factor: Tensor, shift: Tensor
) -> tuple[Tensor, Tensor]:
    """Scales the channels that come out: axis 0, and axis 1 where the layer is transposed."""
    axis = 1 if ops.base_name(layer).startswith("conv_transpose") else 0
    shape = [1] * weight.dim()
    shape[axis] = -1
    return weight * factor.view(shape), shift if bias is None else bias * factor + shift


def _before(
    layer: fx.Node, weight: Tensor, bias: Tensor | None, factor: Tensor, shift: Tensor
) -> tuple[Tensor, Tensor]:
    """Scales the channels that go in; each group of outputs reads its own."""
    groups = 1 if ops.is_call(layer, "linear") else ops.argument(layer, "groups")
    outs, ins = weight.shape[:2]
    shape = (outs, ins, *[1] * (weight.dim() - 2))

    def spread(values: Tensor) -> Tensor:
        return values.view(groups, 1, ins).expand(groups, outs // groups, ins).reshape(shape)

    added = (weight * spread(shift)).flatten(1).sum(1)
    return weight * spread(factor), added if bias is None else added + bias
