"""Folds a batch norm into the convolution or linear beside it.

c = conv2d(x, W, b)
y = batch_norm(c, g, beta, mean, var)    ->    y = conv2d(x, W * s, (b - mean) * s + beta)
with s = g / sqrt(var + eps)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import fx

from redpass import ops
from redpass.analysis.batch_norms import BatchNorm, batch_norms
from redpass.analysis.linears import Linears, linears, new_name
from redpass.facts import Facts
from redpass.plan import Action, Exactness, Insert, Plan, Ref, Replace, SetWeight, Skip, WeightRef
from redpass.program import Program

FIRST = "fold_batch_norms.after_layer"
LAST = "fold_batch_norms.before_layer"


@dataclass(frozen=True)
class FoldBatchNorms:
    """Removes batch norms that run with stored statistics.

    What: a batch norm after a convolution, a transposed one or a linear, or before one.
    When: nothing else reads the value between, or the weights. Before a convolution only without
    padding: padded zeros are not normed. Factors are computed in float64 and rounded once.
    Not tried: batch norms with other ops between, or that read the statistics of the batch.
    Costs: a copy of the layer's weight.
    Source: Jacob et al. 2018, arXiv:1712.05877, section 3.2.
    """

    name: ClassVar[str] = "fold_batch_norms"
    needs: ClassVar[tuple[Any, ...]] = (batch_norms, linears)
    exactness: ClassVar[Exactness] = Exactness.WITHIN_TOLERANCE

    def plan(self, program: Program, facts: Facts) -> Plan:
        """Plans one action per batch norm."""
        return Plan.of(_judge_all(facts.get(batch_norms), facts.get(linears), program))


def _judge_all(
    norms: tuple[BatchNorm, ...], table: Linears, program: Program
) -> Iterator[Action | Skip]:
    for norm in norms:
        rule = FIRST if norm.follows else LAST
        if norm.layer is None:
            yield Skip(rule, norm.node.name, "no convolution or linear stands beside it")
        elif reason := _why_not(norm, norm.layer, table):
            yield Skip(rule, norm.node.name, reason)
        else:
            yield _fold(norm, norm.layer, rule, program)


def _why_not(norm: BatchNorm, layer: fx.Node, table: Linears) -> str | None:
    between = layer if norm.follows else norm.node
    names = norm.operands(layer, "weight", "bias")
    if ops.argument(norm.node, "training"):
        return "it reads the statistics of the batch"
    if len(between.users) > 1:
        return "the value between is read elsewhere too"
    if name := table.shared(name for name in names if name):
        return f"{name} is read elsewhere too"
    if layer.meta["val"].dim() != ops.argument(layer, "weight").meta["val"].dim():
        return "the norm and the layer are about different axes"
    return _why_not_this_layer(norm, layer)


def _why_not_this_layer(norm: BatchNorm, layer: fx.Node) -> str | None:
    if ops.is_call(layer, "linear"):
        return None
    if ops.base_name(layer).startswith("conv_transpose"):
        if not norm.follows or ops.argument(layer, "groups") != 1:
            return "a transposed convolution takes a norm after it, and in one group only"
        return None
    padding = ops.argument(layer, "padding")
    sizes = padding if isinstance(padding, list | tuple) else [padding]
    if not norm.follows and any(size not in (0, "valid") for size in sizes):
        return "the convolution pads with zeros, which are not normed"
    return None


def _fold(norm: BatchNorm, layer: fx.Node, rule: str, program: Program) -> Action:
    old, bias = norm.operands(layer, "weight", "bias")
    weight, offset = norm.folded(layer, program)
    name, source = new_name(program, str(old), "normed"), f"{old} with {norm.node.name}"
    dtype = program.weights[str(old)].dtype
    last = norm.node if norm.follows else layer
    value: Any = layer.args[0] if norm.follows else norm.node.args[0]
    target: Any = layer.target
    args = (Ref(value.name), WeightRef(name), WeightRef(f"{name}_bias"), *layer.args[3:])
    node = f"{layer.name}_normed"
    removed = 4 * offset.numel() if norm.follows else 4 * program.weights[str(old)].shape[1]
    saved = removed - (offset.numel() if bias is None else 0)
    return Action(
        rule,
        norm.node.name,
        (
            SetWeight(name, weight.to(dtype), source),
            SetWeight(f"{name}_bias", offset.to(dtype), source),
            Insert(node, target, args, last.name, dict(layer.kwargs)),
            Replace(last.name, node),
        ),
        f"{layer.name}, just {'before' if norm.follows else 'after'} it, takes factors and shifts",
        {"channels": offset.numel()},
        {"parameters": saved, "bytes": saved * dtype.itemsize},
    )
