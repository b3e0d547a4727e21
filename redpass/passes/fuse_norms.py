"""Writes a traced RMS norm as the one op it is.

s = pow(x, 2)
m = mean(s, [-1], True)
r = rsqrt(m + 1e-6)        ->    z = rms_norm(x, [d], g, 1e-6)
y = x * r
z = g * y
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from redpass import ops
from redpass.analysis.rms_chains import RmsChain, rms_chains
from redpass.facts import Facts
from redpass.plan import Action, Exactness, Insert, Plan, Ref, Replace, Skip
from redpass.program import Program

aten = torch.ops.aten
RULE = "fuse_norms.root_mean_square"


@dataclass(frozen=True)
class FuseNorms:
    """Replaces the five to seven ops of a traced RMS norm by `rms_norm`.

    What: `x * rsqrt(mean(x²) + eps)` in its spellings (`x * x`, `square`, `1 / sqrt`, `x / sqrt`,
    `pow(-0.5)`), and the multiplication by a gain that follows.
    When: the mean runs over the last axis only and nothing else reads the ops between. Casts stay
    where they are: a norm that is computed in float32 still is, and a gain of another type than
    the value stays a multiplication.
    Not tried: layer norms written out; these are traced as `layer_norm` almost everywhere.
    Costs: one walk. Why it is done: ONNX Runtime 1.31 does not find the pattern (it looks for a
    division, `rsqrt` is exported as square root and reciprocal). Time after / before for one norm,
    one core, at 1, 16, 128 and 1024 tokens: ONNX Runtime, widths 384 to 2048, 0.37, 0.39, 0.37,
    0.38; `torch.compile`, width 1024, 0.63, 0.68, 0.50, 0.73; eager 0.83, 0.89, 0.96, and at 1024
    tokens 0.85 at width 384 but 2.5 to 2.8 from 4 MiB on, where the op's own temporary costs page
    faults (fastest runs: 0.95 to 1.01). Without gain, as `fold_norm_gains` leaves most, 0.80.
    Source: Zhang and Sennrich 2019, arXiv:1910.07467.
    """

    name: ClassVar[str] = "fuse_norms"
    needs: ClassVar[tuple[Any, ...]] = (rms_chains,)
    exactness: ClassVar[Exactness] = Exactness.WITHIN_TOLERANCE

    def plan(self, program: Program, facts: Facts) -> Plan:
        """Plans one action per norm."""
        return Plan.of(_judge_all(facts.get(rms_chains), program))


def _judge_all(chains: Mapping[str, RmsChain], program: Program) -> Iterator[Action | Skip]:
    for name, norm in chains.items():
        node = program.nodes[name]
        if reason := _why_not(norm, node):
            yield Skip(RULE, node.name, reason)
        else:
            yield _fuse(norm, node)


def _why_not(norm: RmsChain, node: fx.Node) -> str | None:
    dims, rank = ops.argument(norm.mean, "dim"), norm.value.meta["val"].dim()
    if [dim % rank for dim in dims or ()] != [rank - 1] or not ops.argument(norm.mean, "keepdim"):
        return "the mean does not run over the last axis alone"
    if any(user is not node and user not in norm.inner for n in norm.inner for user in n.users):
        return "a value inside the norm is read elsewhere too"
    if not isinstance(norm.value.meta["val"].shape[-1], int):
        return "the width is not fixed"
    return None


def _fuse(norm: RmsChain, node: fx.Node) -> Action:
    width, gain = int(norm.value.meta["val"].shape[-1]), None
    last = node
    if found := _gain(node, width):
        last, gain = found
    name = f"{last.name}_fused"
    weight = Ref(gain.name) if gain else None
    args = (Ref(norm.value.name), [width], weight, norm.eps)
    return Action(
        RULE,
        last.name,
        (Insert(name, aten.rms_norm.default, args, last.name), Replace(last.name, name)),
        f"{len(norm.inner) + 1 + (gain is not None)} ops compute the RMS norm of {norm.value.name}",
        {"width": width, "eps": norm.eps},
    )


def _gain(node: fx.Node, width: int) -> tuple[fx.Node, fx.Node] | None:
    """Returns the multiplication by a vector that alone reads `node`, and the vector."""
    user = next(iter(node.users), None)
    if len(node.users) != 1 or user is None or not ops.is_call(user, "mul"):
        return None
    for gain in user.all_input_nodes:
        value, dtype = gain.meta["val"], node.meta["val"].dtype
        if gain is not node and tuple(value.shape) == (width,) and value.dtype == dtype:
            return user, gain
    return None
