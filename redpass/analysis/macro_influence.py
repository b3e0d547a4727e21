"""`macro_influence`: how much the final hidden state changes when a layer is left out.

`MI_i = 1 - E cos(h, h_without_i)`, the mean over calibration tokens, with `h` the last value of
the residual stream that depends on layer `i`, before the norm in front of the head. For the
last layer of a stream that is its block influence.

Each batch is run once; from there only what comes behind a left-out layer is run again, half of
the layers on average, so `L` layers cost about `L / 2` runs. Memory holds one batch's stream
values, and the tables and masks that layers share.

Source: FuseGPT, Pei et al. 2024, arXiv:2411.14507 (the signal; their fusion is not done here).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from redpass.analysis.block_influence import WIDTH_CHANGES, why_no_layers
from redpass.analysis.blocks import Block, blocks
from redpass.analysis.structure import structure
from redpass.analysis.tokens import Tokens
from redpass.data import Batch
from redpass.errors import DataError
from redpass.facts import Facts
from redpass.partial import Part
from redpass.program import Program
from redpass.verify.inputs import complete


@dataclass(frozen=True)
class MacroInfluence:
    """Layer label -> influence on the final hidden state, from 0 to 2.

    Attributes:
        skips: layers that were left out, each with the reason.
        reason: why there is nothing at all, or "".
    """

    layers: Mapping[str, float]
    skips: Mapping[str, str]
    reason: str = ""


def macro_influence(program: Program, facts: Facts) -> MacroInfluence:
    """Measures every layer on the calibration data.

    Raises:
        DataError: no calibration data, or a layer without which values are NaN or infinite.
    """
    if reason := why_no_layers(facts):
        return MacroInfluence({}, {}, reason)
    layers = facts.get(blocks)
    tokens = Tokens(program)
    kept = [b for b in layers if tokens.form(b.entry) == tokens.form(b.after)]
    skips = {block.label: WIDTH_CHANGES for block in layers if block not in kept}
    ends = [stream[-1] for stream in facts.get(structure).streams]
    found = facts.recall("macro influence", lambda: _measure(program, kept, ends, facts))
    return MacroInfluence(found, skips)


def _measure(
    program: Program, layers: list[Block], ends: list[str], facts: Facts
) -> dict[str, float]:
    forks = [_Fork(program, layer, ends) for layer in layers]
    wanted = dict.fromkeys(name for fork in forks for name in fork.needs)
    base = Part(program, wanted, ())
    tokens, sums, count = Tokens(program), dict.fromkeys(forks, 0.0), dict.fromkeys(forks, 0)
    for batch in facts.data():
        inputs = complete(program, batch)
        values = _values(program, base, inputs)
        for fork in forks:
            cosines = fork.cosines(values, inputs, tokens)
            sums[fork] += float(cosines.sum())
            count[fork] += len(cosines)
    return {fork.layer.label: 1.0 - sums[fork] / max(count[fork], 1) for fork in forks}


def _values(program: Program, base: Part, inputs: Batch) -> dict[str, Any]:
    """What all forks start from and are compared with, on one batch."""
    ports = [port.name for port in program.signature.inputs]
    given = {node.name: inputs[port] for node, port in zip(program.inputs, ports, strict=True)}
    return given | base.run(given)


class _Fork:
    """The run behind one layer, when its input is taken for its output."""

    def __init__(self, program: Program, layer: Block, ends: list[str]) -> None:
        self.layer = layer
        start = program.nodes[layer.after]
        behind = _behind(start)
        order = {name: place for place, name in enumerate(program.nodes)}
        self.end = max((e for e in ends if program.nodes[e] in behind), key=order.__getitem__)
        known = {n.name for n in program.graph.nodes if n not in behind and n.op != "get_attr"}
        self.part = Part(program, [self.end], known | {layer.after})
        self.needs = self.part.needs | {layer.entry, layer.after, self.end}

    def cosines(self, values: Mapping[str, Any], inputs: Batch, tokens: Tokens) -> Tensor:
        """The cosines between the end of the stream with and without the layer, `[tokens]`."""
        # The stream may be flattened on the way (OPT): same tokens, another shape.
        skipped = values[self.layer.entry].reshape(values[self.layer.after].shape)
        given = {**values, self.layer.after: skipped}
        without = tokens.rows(self.end, self.part.run(given)[self.end], inputs).double()
        whole = tokens.rows(self.end, values[self.end], inputs).double()
        found = torch.cosine_similarity(whole, without, dim=-1, eps=1e-150)
        if not bool(torch.isfinite(found).all()):
            found_in = "the final hidden state is NaN or infinite with or without it"
            raise DataError(found_in, place=self.layer.label)
        return found


def _behind(start: fx.Node) -> set[fx.Node]:
    """The node and all that depends on it."""
    found, todo = {start}, [start]
    while todo:
        fresh = [user for user in todo.pop().users if user not in found]
        found.update(fresh)
        todo.extend(fresh)
    return found
