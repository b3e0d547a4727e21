"""`angular_distance`: how far a span of layers turns the residual stream.

`d(l, n) = E arccos(cos(x_l, x_{l+n})) / π`, the mean over calibration tokens of the angle between
the stream before layer `l` and behind the `n` layers from it; from 0 (same direction) to 1.

Source: Gromov et al. 2024, arXiv:2403.17887, who take the last token of each row; here all tokens
count, as encoders have no last one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from redpass.analysis.block_influence import why_no_layers
from redpass.analysis.blocks import blocks
from redpass.analysis.stream_statistics import stream_statistics
from redpass.facts import Facts
from redpass.program import Program


@dataclass(frozen=True)
class AngularDistance:
    """Distances of all spans.

    Attributes:
        layers: labels of the layers, in order.
        distances: `[start][n - 1]` for the span of `n` layers from `start`; NaN where the span
            ends behind the last layer, leaves its stream or meets another shape.
        reason: why there is nothing, or "".
    """

    layers: tuple[str, ...] = ()
    distances: tuple[tuple[float, ...], ...] = ()
    reason: str = ""

    def nearest(self, length: int) -> int | None:
        """Returns the start of the span of `length` layers that turns the stream least.

        None when no span is that long. Raises ValueError below one layer.
        """
        if length < 1:
            raise ValueError(f"a span has at least one layer, not {length}")
        found = [
            (row[length - 1], start)
            for start, row in enumerate(self.distances)
            if length <= len(row) and not math.isnan(row[length - 1])
        ]
        return min(found)[1] if found else None


def angular_distance(program: Program, facts: Facts) -> AngularDistance:
    """Reads the distances of all spans off the calibration run.

    Costs nothing beside `stream_statistics`, which see for what it raises.
    """
    del program
    if reason := why_no_layers(facts):
        return AngularDistance(reason=reason)
    layers, measured = facts.get(blocks), facts.get(stream_statistics)

    def distance(start: int, end: int) -> float:
        if end >= len(layers) or layers[start].stream != layers[end].stream:
            return math.nan
        pair = measured.between(layers[start].entry, layers[end].after)
        return pair[1] if pair else math.nan

    count = len(layers)
    distances = tuple(
        tuple(distance(start, start + n) for n in range(count)) for start in range(count)
    )
    return AngularDistance(tuple(layer.label for layer in layers), distances)
