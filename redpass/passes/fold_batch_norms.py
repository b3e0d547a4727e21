"""Folds a batch norm into the convolution or linear beside it.

c = conv2d(x, W, b)
y = batch_norm(c, g, beta, mean, var)    ->    y = conv2d(x, W * s, (b - mean) * s + beta)
with s = g / sqrt(var + eps)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

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
    fit: dict[fx.Node, list[BatchNorm]] = {}
    for norm in norms:
        if norm.layer is None:
            yield Skip(FIRST, norm.node.name, "no convolution or linear stands beside it")
        elif reason := _why_not(norm, norm.layer, table):
            yield Skip(FIRST if norm.follows else LAST, norm.node.name, reason)
        else:
            fit.setdefault(norm.layer, []).append(norm)
    yield from (_fold(found, layer, program) for layer, found in fit.items())


def _why_not(norm: BatchNorm, layer: fx.Node, table: Linears) -> str | None:
    between = layer if norm.follows else norm.result
    names = norm.operands(layer, "weight", "bias")
    if norm.is_training:
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


def _fold(norms: list[BatchNorm], layer: fx.Node, program: Program) -> Action:
    """Folds one norm, or the one before and the one after, into `layer`."""
    value, last = layer.args[0], layer
    old, old_bias = norms[0].operands(layer, "weight", "bias")
    weight = program.weights[str(old)].double()
    bias = None if old_bias is None else program.weights[old_bias].double()
    for norm in norms:
        weight, bias = norm.fold(layer, weight, bias, program)
        value, last = (value, norm.result) if norm.follows else (norm.node.args[0], last)
    name, dtype = new_name(program, str(old), "normed"), program.weights[str(old)].dtype
    source: Any = value
    target: Any = layer.target
    args = (Ref(source.name), WeightRef(name), WeightRef(f"{name}_bias"), *layer.args[3:])
    node = f"{layer.name}_normed"
    names = " and ".join(norm.node.name for norm in norms)
    return Action(
        FIRST if norms[0].follows else LAST,
        norms[0].node.name,
        (
            SetWeight(name, weight.to(dtype), f"{old} with {names}"),
            SetWeight(f"{name}_bias", _rounded(bias, dtype), f"{old_bias} with {names}"),
            Insert(node, target, args, last.name, dict(layer.kwargs)),
            Replace(last.name, node),
        ),
        f"{layer.name} takes the factors and shifts of {names}",
        {"norms": len(norms)},
    )


def _rounded(bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Every fold makes a bias; None is what the type allows before the first."""
    if bias is None:
        raise ValueError("no norm was folded")
    return bias.to(dtype)
