"""`cka`: linear centred kernel alignment between the stream before and behind every layer.

`CKA(X, Y) = |XᵀY|² / (|XᵀX| |YᵀY|)` (Frobenius norms) with the features of `X` and `Y` centred over
all calibration tokens. 1 for representations that are equal up to rotation, shift and scale.

Computed from cross-Gram matrices of all pairs while these take at most 64 MiB together, which
is exact. Above that, `|XᵀY|²` is replaced by its unbiased estimate (HSIC) on stretches of 256
tokens, averaged over the stretches before the quotient is formed: memory is then independent
of the width.

Sources: Kornblith et al. 2019, arXiv:1905.00414; the estimate by Nguyen et al. 2021,
arXiv:2010.15327.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from redpass.analysis.block_influence import why_no_layers
from redpass.analysis.blocks import blocks
from redpass.analysis.stream_statistics import Stage, stream_statistics
from redpass.errors import DataError
from redpass.facts import Facts
from redpass.program import Program

LEAST_TOKENS = 4


@dataclass(frozen=True)
class Cka:
    """Alignments of all pairs of stages.

    Attributes:
        labels: `input` and `after layers.0`, ... in order.
        values: `[i][j]`; NaN between stages of different streams or shapes, or for a stage
            that does not vary over tokens.
        estimator: `exact`, or the size of the stretches it was estimated on.
        reason: why there is nothing, or "".
    """

    labels: tuple[str, ...] = ()
    values: tuple[tuple[float, ...], ...] = ()
    estimator: str = ""
    reason: str = ""


def cka(program: Program, facts: Facts) -> Cka:
    """Reads the alignments off the calibration run, see `stream_statistics` for what it raises.

    Raises:
        DataError: fewer than four tokens.
    """
    del program
    if reason := why_no_layers(facts):
        return Cka(reason=reason)
    stages = facts.get(stream_statistics).stages
    _check(stages, facts)
    behind = {block.after: f"after {block.label}" for block in facts.get(blocks)}
    before = {block.entry: f"before {block.label}" for block in facts.get(blocks)}
    first = facts.get(blocks)[0].entry
    names = before | behind | {first: "input"}
    places = [(s, i) for s in stages for i, name in enumerate(s.borders) if name in names]
    values = tuple(
        tuple(_alignment(a, i, j) if a is b else math.nan for b, j in places) for a, i in places
    )
    labels = tuple(names[stage.borders[i]] for stage, i in places)
    return Cka(labels, values, stages[0].estimator)


def _check(stages: tuple[Stage, ...], facts: Facts) -> None:
    tokens = min(stage.tokens for stage in stages)
    if tokens < LEAST_TOKENS:
        raise DataError(
            f"CKA needs {LEAST_TOKENS} tokens that are no padding, and there are {tokens}",
            file=facts.data().source,
            hint="give more rows, or longer ones",
        )


def _alignment(stage: Stage, i: int, j: int) -> float:
    found = stage.alignments
    scale = found[i][i] * found[j][j]
    return found[i][j] / math.sqrt(scale) if scale > 0 else math.nan
