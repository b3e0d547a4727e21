"""What is drawn of a run: rows of branches and layers, heat maps, curves."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class BranchRecord:
    """One branch of the original model, for the per-branch table.

    Attributes:
        similarity: mean cosine between the stream before and after the branch, or None.
        outcome: `kept`, `dropped`, or what else was done to it.
        entropy: of its output, nats a feature, or None.
    """

    label: str
    kind: str
    layer: int
    parameters: int
    flops: float
    similarity: float | None
    outcome: str
    entropy: float | None = None


@dataclass(frozen=True)
class LayerRecord:
    """One layer of the original model; figures that were not measured are None.

    Attributes:
        branches: labels of its branches.
        influence: `1 - cosine` between the stream before and behind it.
        macro_influence: `1 - cosine` between the final hidden state with and without it.
        entropy: of its attention's output minus that of its feed-forward, nats a feature.
        outcome: `kept`, `dropped`, or what was done to some of its branches.
    """

    label: str
    branches: list[str]
    parameters: int
    flops: float
    influence: float | None = None
    macro_influence: float | None = None
    entropy: float | None = None
    outcome: str = "kept"


@dataclass(frozen=True)
class Matrix:
    """A labelled matrix, drawn as a heat map; None stands for what was not measured.

    Attributes:
        labels: one a row; and one a column where `columns` is empty.
        low, high: the figures at the two ends of the colours.
        alike: which end says that parts are alike, `high` or `low`; drawn light.
        y_title, x_title: what rows and columns are.
        note: what the figures are, in a sentence or two.
    """

    title: str
    labels: list[str]
    values: list[list[float | None]]
    low: float = 0.0
    high: float = 1.0
    columns: list[str] = field(default_factory=list)
    alike: str = "high"
    y_title: str = ""
    x_title: str = ""
    note: str = ""


@dataclass(frozen=True)
class CurvePoint:
    """Quality at one share removed.

    Attributes:
        removed: share of the cost that is gone, 0 for the untouched model, below 1.
        quality: the metric there.
        stderr: its standard error, NaN where it is not known.
        label: what was done to get there (the action that was added last), or "".
    """

    removed: float
    quality: float
    stderr: float = float("nan")
    label: str = ""


@dataclass(frozen=True)
class Curve:
    """Quality against the share removed, for one method; points by rising share.

    Curves with equal `metric` and `cost` are drawn in one plot.

    Attributes:
        method: the method in words: `verified greedy on branches`.
        metric: what `quality` is; `better` says whether `lower` or `higher` is better.
        cost: what is removed: `parameters`, `flops`...
    """

    method: str
    metric: str
    better: str
    points: list[CurvePoint]
    cost: str = "parameters"
