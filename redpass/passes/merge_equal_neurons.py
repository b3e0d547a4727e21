"""Merges hidden neurons that compute the same, or the same up to a factor.

h3 = relu(2 * w1 x)                              (a row of W1 is twice another)
y = linear([h1, h2, h3], [a, b, c])    ->    y = linear([h1, h2], [a + 2 c, b])
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from redpass.analysis.channels import ANY, EXACT, freedom, most_cut, narrowed
from redpass.analysis.hidden_layers import HiddenLayer, hidden_layers
from redpass.analysis.linears import Linear
from redpass.facts import Facts
from redpass.plan import Action, Exactness, Plan, Skip
from redpass.program import Program

RULE = "merge_equal_neurons.hidden"


@dataclass(frozen=True)
class MergeEqualNeurons:
    """Keeps one of several neurons with the same incoming weights, and adds the outgoing ones.

    What: neurons of one hidden layer, in any places. Rows and biases must be equal bit by bit where
    a nonlinearity reads them; equal up to a positive factor under ReLU, and up to any factor where
    the channel is linear in them (the `up` of a gated layer), to two roundings.
    When: only elementwise ops stand between the linears and nothing else reads anything there.
    Not tried: neurons that are alike but not equal, or sums of others.
    Costs: one float64 copy of a layer's first weights at a time; candidates are found by sorting
    one random projection of the rows, so time is linear in the weights.
    Source: iterative feature merging, Chen, Zhou and Yan 2024; here only what is exactly equal.

    Attributes:
        multiple: what the width left is a multiple of.
    """

    name: ClassVar[str] = "merge_equal_neurons"
    needs: ClassVar[tuple[Any, ...]] = (hidden_layers,)
    exactness: ClassVar[Exactness] = Exactness.WITHIN_TOLERANCE

    multiple: int = 8

    def plan(self, program: Program, facts: Facts) -> Plan:
        """Plans one action per hidden layer with equal neurons."""
        return Plan.of(self._judge(layer, program) for layer in facts.get(hidden_layers))

    def _judge(self, layer: HiddenLayer, program: Program) -> Action | Skip:
        place = layer.second.node
        if layer.obstacle:
            return Skip(RULE, place, layer.obstacle)
        neurons = _Neurons(layer, program)
        pairs = neurons.pairs()
        if not pairs:
            return Skip(RULE, place, "no two neurons are equal")
        count = most_cut(len(pairs), layer.width, self.multiple)
        if count == 0:
            reason = f"{len(pairs)} of {layer.width} neurons: the rest is no multiple of"
            return Skip(RULE, place, f"{reason} {self.multiple}")
        return _merge(layer, dict(sorted(pairs.items())[:count]), neurons.scales, program)


class _Neurons:
    """The rows of one layer, each divided by its factor: equal rows are equal neurons."""

    def __init__(self, layer: HiddenLayer, program: Program) -> None:
        self.rows: list[Tensor] = []
        self.slack: list[float] = []
        self.scales = torch.ones(layer.width, dtype=torch.float64)
        for linear in layer.first:
            self._add(linear, freedom(layer, linear, program), program)
        for vector in layer.vectors:
            self.rows.append(program.weights[str(vector.target)].double()[:, None])
            self.slack.append(0.0)

    def _add(self, linear: Linear, free: str, program: Program) -> None:
        rows, bias = linear.matrix(program).double(), linear.offset(program)
        rows = rows if bias is None else torch.cat([rows, bias.double()[:, None]], dim=1)
        if free != EXACT:
            scale = rows.norm(dim=1)
            largest = rows.gather(1, rows.abs().argmax(1, keepdim=True)).flatten()
            scale = scale * largest.sign() if free == ANY else scale
            scale = torch.where(scale == 0, 1.0, scale)
            rows, self.scales = rows / scale[:, None], self.scales * scale
        eps = torch.finfo(program.weights[linear.weight].dtype).eps
        self.rows.append(rows)
        self.slack.append(0.0 if free == EXACT else 2 * eps)

    def pairs(self) -> dict[int, int]:
        """Returns neuron -> the first neuron equal to it, for all that have one before them."""
        generator = torch.Generator().manual_seed(0)
        places = torch.zeros_like(self.scales)
        for rows in self.rows:
            direction = torch.randn(rows.shape[1], generator=generator, dtype=rows.dtype)
            places += rows @ direction / direction.norm()
        window = 1e-12 + 4 * max(self.slack)
        return dict(self._neighbours(places, window))

    def _neighbours(self, places: Tensor, window: float) -> Iterator[tuple[int, int]]:
        """Compares each neuron with the kept ones whose projection is within `window`."""
        kept: list[int] = []
        values = places.tolist()
        for index in sorted(range(len(values)), key=lambda i: (values[i], i)):
            kept = [k for k in kept if values[index] - values[k] <= window]
            same = next((k for k in kept if self._is_same(index, k)), None)
            if same is None:
                kept.append(index)
            else:
                yield index, same

    def _is_same(self, left: int, right: int) -> bool:
        return all(
            float((rows[left] - rows[right]).abs().max()) <= slack
            for rows, slack in zip(self.rows, self.slack, strict=True)
        )


def _merge(layer: HiddenLayer, pairs: dict[int, int], scales: Tensor, program: Program) -> Action:
    old = layer.second.matrix(program)
    matrix = old.double().clone()
    for gone, kept in pairs.items():
        matrix[:, kept] += matrix[:, gone] * (scales[gone] / scales[kept])
    keep = torch.tensor([i for i in range(layer.width) if i not in pairs])
    edits = tuple(narrowed(layer, program, keep, matrix[:, keep].to(old.dtype), None))
    removed = len(pairs) * (layer.second.outs + sum(linear.ins for linear in layer.first))
    return Action(
        RULE,
        layer.second.node,
        edits,
        f"{len(pairs)} of {layer.width} neurons compute what another one does",
        {"neurons": len(pairs), "width": layer.width},
        {"parameters": removed, "bytes": removed * old.dtype.itemsize},
    )
