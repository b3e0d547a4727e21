"""`branch_entropy`: how much a branch's output varies, attention against its feed-forward.

Each feature of the branch's output (the value added to the stream) is taken as Gaussian over
calibration tokens; its differential entropy is `ln(2πe variance) / 2` nats. A branch has the mean
over its features; a constant feature counts with a variance of 1e-12. A layer has the difference
of its attention and its feed-forward. A low difference says that the attention adds little that
the feed-forward would not carry: it is a candidate to become the identity.

Source: Lin et al. 2024, "MLP Can Be A Good Transformer Learner", arXiv:2404.05657, who take the sum
of the logarithms of the features' standard deviations: the same order of branches at one width.
Their transfer entropy, which measures with sets of attentions left out, is not computed; see
`macro_influence` for that.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from redpass.analysis.block_influence import why_no_layers
from redpass.analysis.blocks import Block, blocks
from redpass.analysis.stream_statistics import BranchFigures, stream_statistics
from redpass.errors import DataError
from redpass.facts import Facts
from redpass.program import Program

LEAST_TOKENS = 2


@dataclass(frozen=True)
class BranchEntropy:
    """Entropies in nats a feature.

    Attributes:
        branches: branch label -> entropy of its output.
        layers: layer label -> entropy of its attention minus that of its feed-forward (or of
            its experts); only layers that have one of each.
        reason: why `layers` is empty, or "".
    """

    branches: Mapping[str, float]
    layers: Mapping[str, float]
    reason: str = ""


def branch_entropy(program: Program, facts: Facts) -> BranchEntropy:
    """Reads the entropies off the calibration run, see `stream_statistics` for what it raises.

    Raises:
        DataError: fewer than two tokens.
    """
    del program
    measured = facts.get(stream_statistics).branches
    for label, figures in measured.items():
        if math.isnan(figures.entropy):
            raise DataError(
                f"entropy needs {LEAST_TOKENS} tokens that are no padding, "
                f"and there are {figures.tokens}",
                place=label,
                hint="give more rows, or longer ones",
            )
    found = {label: figures.entropy for label, figures in measured.items()}
    layers = {
        block.label: difference
        for block in facts.get(blocks)
        if (difference := _difference(block, measured)) is not None
    }
    reason = why_no_layers(facts) or ("" if layers else "no layer has attention and feed-forward")
    return BranchEntropy(found, layers, reason)


def _difference(block: Block, measured: Mapping[str, BranchFigures]) -> float | None:
    attention = [measured[b.label].entropy for b in block.branches if b.kind == "attention"]
    others = [
        measured[b.label].entropy for b in block.branches if b.kind in ("feed-forward", "experts")
    ]
    return attention[0] - others[0] if len(attention) == len(others) == 1 else None
