"""Folds a multiplication of channels into the linears that read them.

n = rms_norm(x, [d], g, eps)         n = rms_norm(x, [d], None, eps)
q = linear(n, Wq)               ->   q = linear(n, Wq * g)
k = linear(n, Wk)                    k = linear(n, Wk * g)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from redpass import ops
from redpass.analysis.channel_scales import ChannelScale, channel_scales
from redpass.analysis.linears import Linear, Linears, linears, new_name
from redpass.facts import Facts
from redpass.plan import Action, Edit, Exactness, Insert, Plan, Ref, Replace, SetWeight, Skip
from redpass.program import Program

NORMS = "fold_norm_gains.norm"
PRODUCTS = "fold_norm_gains.multiply"


@dataclass(frozen=True)
class FoldNormGains:
    """Moves a norm's gain, and a layer norm's bias, into all linears that read it.

    What: the gain of `rms_norm`, `layer_norm`, and any multiplication by a weight vector, with
    casts and views that keep the channels between it and the linears.
    When: every reader is a linear, no linear's weight is read elsewhere (a tied head keeps its
    gain). One product of two numbers rounds once; a bias is summed in float64.
    Not tried: scales after a linear, gains computed from anything but one weight.
    Costs: a copy of each linear's weight. Time of the norm after / before, eager, one core, widths
    384 to 1024 at 1, 16, 128, 1024 tokens: `rms_norm` 0.70, 0.71, 0.63, 0.51; `layer_norm` 0.47,
    0.75, 1.26, 1.66. ONNX Runtime's kernels always multiply: 0.89 to 1.00. So layer norms
    are left alone unless asked for.

    Attributes:
        layer_norms: fold gains and biases of `layer_norm` too.
    """

    name: ClassVar[str] = "fold_norm_gains"
    needs: ClassVar[tuple[Any, ...]] = (linears, channel_scales)
    exactness: ClassVar[Exactness] = Exactness.WITHIN_TOLERANCE

    layer_norms: bool = False

    def plan(self, program: Program, facts: Facts) -> Plan:
        """Plans one action per gain."""
        table = facts.get(linears)
        return Plan.of(self._judge(s, table, program) for s in facts.get(channel_scales))

    def _judge(self, scale: ChannelScale, table: Linears, program: Program) -> Action | Skip:
        rule = NORMS if scale.is_norm else PRODUCTS
        if ops.is_call(scale.node, "layer_norm") and not self.layer_norms:
            return Skip(rule, scale.node.name, "a layer norm without gain was measured no faster")
        readers = tuple(_readers(scale.node, scale.width, table))
        if reason := _why_not(readers, table):
            return Skip(rule, scale.node.name, reason)
        return _fold(scale, tuple(r for r in readers if isinstance(r, Linear)), program)


def _readers(node: fx.Node, width: int, table: Linears) -> Iterator[Linear | fx.Node]:
    """Yields what reads the channels: linears, and any other node that is in the way."""
    for user in node.users:
        linear = table.by_node.get(user.name)
        if linear and linear.input == node.name:
            yield linear
        elif ops.is_call(user, *ops.CASTS, *ops.RESHAPES):
            kept = user.meta["val"].dim() > 1 and user.meta["val"].shape[-1] == width
            yield from _readers(user, width, table) if kept else (user,)
        else:
            yield user


def _why_not(readers: tuple[Linear | fx.Node, ...], table: Linears) -> str | None:
    for reader in readers:
        if isinstance(reader, fx.Node):
            return f"{reader.name}, which reads it, is not a linear"
        if name := table.shared((reader.weight,)):
            return f"{name} is read elsewhere too, so a copy with the gain would add bytes"
    return None if readers else "nothing reads it"


def _fold(scale: ChannelScale, readers: tuple[Linear, ...], program: Program) -> Action:
    node, plain = scale.node, scale.value.name
    edits: list[Edit] = []
    if scale.is_norm:
        plain = f"{node.name}_plain"
        eps = ops.argument(node, "eps")
        none = (None,) if ops.is_call(node, "rms_norm") else (None, None)
        args = (Ref(scale.value.name), list(ops.argument(node, "normalized_shape")), *none, eps)
        edits.append(Insert(plain, node.target, args, node.name))  # type: ignore[arg-type]
    edits.append(Replace(node.name, plain))
    for linear in readers:
        edits += _scaled(linear, scale, program)
    names = ", ".join(linear.node for linear in readers)
    width = scale.width * (1 if scale.bias is None else 2)
    return Action(
        NORMS if scale.is_norm else PRODUCTS,
        node.name,
        tuple(edits),
        f"only linears read it ({names}): their weights take the gain",
        {"linears": len(readers)},
        {"parameters": width, "bytes": width * scale.gain.meta["val"].dtype.itemsize},
    )


def _scaled(linear: Linear, scale: ChannelScale, program: Program) -> Iterator[Edit]:
    gain = program.weights[str(scale.gain.target)]
    matrix = linear.matrix(program)
    weight, bias = new_name(program, linear.weight, "scaled"), linear.bias
    source = f"{linear.weight} * {scale.gain.target}"
    yield linear.store(weight, (matrix * gain).to(matrix.dtype), source)
    if scale.bias is not None:
        shift = program.weights[str(scale.bias.target)]
        bias = f"{weight}_bias"
        yield SetWeight(bias, _shifted(linear, shift, program), source)
    node = f"{linear.node}_scaled"
    yield linear.call(node, linear.input, weight, bias, linear.node)
    yield Replace(linear.node, node)


def _shifted(linear: Linear, shift: Tensor, program: Program) -> Tensor:
    matrix, offset = linear.matrix(program), linear.offset(program)
    added = torch.mv(matrix.double(), shift.double())
    return (added if offset is None else added + offset.double()).to(matrix.dtype)
