"""Values whose last axis is multiplied by a weight vector: norms with a gain, and products."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from redpass import ops
from redpass.facts import Facts
from redpass.program import Program


@dataclass(frozen=True)
class ChannelScale:
    """A node that multiplies the last axis by `gain`, and may add `bias`, both weights.

    Attributes:
        node: the node that computes it.
        gain: the `get_attr` node of the factors `[width]`.
        bias: the `get_attr` node of what is added `[width]`, or None.
        value: what is normed or multiplied.
        is_norm: whether `node` is a norm, not a plain product.
    """

    node: fx.Node
    gain: fx.Node
    bias: fx.Node | None
    value: fx.Node
    is_norm: bool

    @property
    def width(self) -> int:
        """How many channels there are."""
        return int(self.gain.meta["val"].shape[0])


def channel_scales(program: Program, facts: Facts | None = None) -> tuple[ChannelScale, ...]:
    """Finds them all, in graph order."""
    del facts
    return tuple(scale for node in program.graph.nodes if (scale := _match(node)))


def _match(node: fx.Node) -> ChannelScale | None:
    if ops.is_call(node, "rms_norm", "layer_norm"):
        bias = ops.argument(node, "bias") if ops.is_call(node, "layer_norm") else None
        return _scale(node, ops.argument(node, "weight"), bias, is_norm=True)
    if ops.is_call(node, "mul") and len(node.all_input_nodes) == 2:
        gain = next((a for a in node.all_input_nodes if a.op == "get_attr"), None)
        return _scale(node, gain, None, is_norm=False)
    return None


def _scale(
    node: fx.Node, gain: fx.Node | None, bias: fx.Node | None, *, is_norm: bool
) -> ChannelScale | None:
    if gain is None or gain.op != "get_attr" or gain.meta["val"].dim() != 1:
        return None
    if bias is not None and bias.op != "get_attr":
        return None
    value = next(a for a in node.all_input_nodes if a is not gain and a is not bias)
    shape = value.meta["val"].shape
    fits = len(shape) > 1 and shape[-1] == gain.meta["val"].shape[0]
    return ChannelScale(node, gain, bias, value, is_norm) if fits else None
