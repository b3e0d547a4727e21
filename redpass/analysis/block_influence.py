"""`block_influence`: how far each layer turns the residual stream.

`BI_i = 1 - E cos(x_i, x_{i+1})`, the mean over calibration tokens, with `x_i` the stream before
layer `i` and `x_{i+1}` behind it (behind its last norm in a post-norm model). 0 is a layer that
changes no direction; a layer that only scales the stream has 0 too.

Source: ShortGPT, Men et al. 2024, arXiv:2403.03853.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from redpass.analysis.blocks import blocks
from redpass.analysis.stream_statistics import stream_statistics
from redpass.analysis.structure import structure
from redpass.facts import Facts
from redpass.program import Program

WIDTH_CHANGES = "the stream before it and the one behind it differ in width or number of tokens"


@dataclass(frozen=True)
class BlockInfluence:
    """Layer label -> influence, from 0 to 2; the least are the first candidates to drop.

    Attributes:
        skips: layers that were left out, each with the reason.
        reason: why there is nothing at all, or "".
    """

    layers: Mapping[str, float]
    skips: Mapping[str, str]
    reason: str = ""


def block_influence(program: Program, facts: Facts) -> BlockInfluence:
    """Reads every layer's influence off the calibration run.

    Costs nothing beside `stream_statistics`, which see for what it raises.
    """
    del program
    if reason := why_no_layers(facts):
        return BlockInfluence({}, {}, reason)
    measured = facts.get(stream_statistics)
    layers, skips = dict[str, float](), dict[str, str]()
    for block in facts.get(blocks):
        pair = measured.between(block.entry, block.after)
        if pair is None:
            skips[block.label] = WIDTH_CHANGES
        else:
            layers[block.label] = 1.0 - pair[0]
    return BlockInfluence(layers, skips)


def why_no_layers(facts: Facts) -> str:
    """Returns why a program has no layers to measure, or "" when it has."""
    if not facts.get(structure).branches:
        return "no residual stream with branches was found"
    if not facts.get(blocks):
        return "no layer repeats: there are fewer than two on one residual stream"
    return ""
