"""Merges hidden neurons that compute the same, or the same up to a factor.

h3 = relu(2 * w1 x)                              (a row of W1 is twice another)
y = linear([h1, h2, h3], [a, b, c])    ->    y = linear([h1, h2], [a + 2 c, b])
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from redpass.analysis.batch_norms import BatchNorm, batch_norms
from redpass.analysis.channels import EXACT, freedom, most_cut, narrowed
from redpass.analysis.equal_rows import EqualRows
from redpass.analysis.hidden_layers import HiddenLayer, hidden_layers
from redpass.analysis.widths.equal_units import equal_units, is_channels, merges
from redpass.analysis.widths.ladders import step_of
from redpass.analysis.widths.narrowing import Width, Widths, narrow, widths
from redpass.facts import Facts
from redpass.plan import Action, Exactness, Plan, Skip
from redpass.program import Program

RULE = "merge_equal_neurons.hidden"
CHANNELS = "merge_equal_neurons.channels"


@dataclass(frozen=True)
class MergeEqualNeurons:
    """Keeps one of several neurons with the same incoming weights, and adds the outgoing ones.

    What: neurons of one hidden layer, in any places. Rows and biases must be equal bit by bit where
    a nonlinearity reads them; equal up to a positive factor under ReLU, and up to any factor where
    the channel is linear in them (the `up` of a gated layer), to two roundings. Channels of
    convolutions likewise, through batch norms, residual sums, concatenations and gates; up to a
    factor where one convolution makes them and ReLU and pools alone stand behind.
    When: only elementwise ops stand between the linears and nothing else reads anything there; of
    convolutions, all that has the width can be narrower.
    Not tried: neurons that are alike but not equal, or sums of others.
    Costs: one float64 copy of a layer's first weights at a time; candidates are found by sorting
    one random projection of the rows, so time is linear in the weights.
    Source: iterative feature merging, Chen, Zhou and Yan 2024; here only what is exactly equal.

    Attributes:
        multiple: what the width left is a multiple of.
    """

    name: ClassVar[str] = "merge_equal_neurons"
    needs: ClassVar[tuple[Any, ...]] = (hidden_layers, widths, batch_norms)
    exactness: ClassVar[Exactness] = Exactness.WITHIN_TOLERANCE

    multiple: int = 8

    def plan(self, program: Program, facts: Facts) -> Plan:
        """Plans one action per hidden layer with equal neurons."""
        layers = Plan.of(self._judge(layer, program) for layer in facts.get(hidden_layers))
        channels = Plan.of(self._channels(program, facts))
        return Plan(layers.actions + channels.actions, layers.skips + channels.skips)

    def _channels(self, program: Program, facts: Facts) -> Iterator[Action | Skip]:
        found = facts.get(widths)
        norms = {n.layer.name: n for n in facts.get(batch_norms) if n.follows and n.layer}
        for width in found.found:
            if not is_channels(program, width):
                continue
            if width.obstacle or program.is_fake:
                why = width.obstacle or "the weights carry no data"
                yield Skip(CHANNELS, width.makers[0], why)
                continue
            yield self._merged(found, width, norms, program)

    def _merged(
        self, found: Widths, width: Width, norms: Mapping[str, BatchNorm], program: Program
    ) -> Action | Skip:
        place, same = width.makers[0], equal_units(program, found, width, norms)
        if not same.pairs:
            return Skip(CHANNELS, place, "no two channels are equal")
        step = step_of(width, self.multiple)
        count = most_cut(len(same.pairs), width.size, step)
        if count == 0:
            reason = f"{len(same.pairs)} of {width.size} channels: the rest is no multiple of"
            return Skip(CHANNELS, place, f"{reason} {step}")
        gone = torch.tensor(sorted(same.pairs)[:count])
        keep = torch.tensor([u for u in range(width.size) if u not in set(gone.tolist())])
        repairs = merges(width, same, gone, keep)
        if isinstance(repairs, str):
            return Skip(CHANNELS, place, repairs)
        return Action(
            CHANNELS,
            place,
            tuple(narrow(found, width, keep, repairs, program)),
            f"{len(gone)} of {width.size} channels compute what another one does",
            {"channels": len(gone), "width": width.size},
        )

    def _judge(self, layer: HiddenLayer, program: Program) -> Action | Skip:
        place = layer.second.node
        if layer.obstacle:
            return Skip(RULE, place, layer.obstacle)
        rows = _rows(layer, program)
        pairs = rows.pairs()
        if not pairs:
            return Skip(RULE, place, "no two neurons are equal")
        count = most_cut(len(pairs), layer.width, self.multiple)
        if count == 0:
            reason = f"{len(pairs)} of {layer.width} neurons: the rest is no multiple of"
            return Skip(RULE, place, f"{reason} {self.multiple}")
        return _merge(layer, dict(sorted(pairs.items())[:count]), rows.scales, program)


def _rows(layer: HiddenLayer, program: Program) -> EqualRows:
    """The rows of one layer: equal rows are equal neurons."""
    found = EqualRows(layer.width)
    for linear in layer.first:
        rows, bias = linear.matrix(program).double(), linear.offset(program)
        rows = rows if bias is None else torch.cat([rows, bias.double()[:, None]], dim=1)
        eps = torch.finfo(program.weights[linear.weight].dtype).eps
        found.add(rows, freedom(layer, linear, program), eps)
    for vector in layer.vectors:
        found.add(program.weights[str(vector.target)].double()[:, None], EXACT, 0.0)
    return found


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
