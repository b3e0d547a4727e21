"""What a run leaves for reports: frozen records that turn into JSON and back."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field

from redpass.record.drawn import BranchRecord, Curve, CurvePoint, LayerRecord, Matrix
from redpass.record.reading import from_json

__all__ = [
    "OUTCOMES", "ActionRecord", "BranchRecord", "CostRecord", "Curve", "CurvePoint",
    "LatencyRecord", "LayerRecord", "Matrix", "PassRecord", "QualityRecord", "Recipe",
    "RunRecord", "SkipRecord", "from_json",
]  # fmt: skip

OUTCOMES = ("applied", "rolled back", "refused", "beyond limit", "skipped by user", "planned")
"""What became of an action. `refused`: over budget; `rolled back`: failed its check."""


@dataclass(frozen=True)
class ActionRecord:
    """One action and what became of it.

    Attributes:
        number: its place in the run, counted from 1 over all passes; what REDPASS_LIMIT counts.
        outcome: one of `OUTCOMES`.
        why: the check or measurement behind the outcome, in words.
    """

    number: int
    key: str
    pass_name: str
    target: str
    reason: str
    outcome: str
    why: str = ""
    evidence: dict[str, float] = field(default_factory=dict)
    saving: dict[str, float] = field(default_factory=dict)
    loss: float | None = None


@dataclass(frozen=True)
class SkipRecord:
    """A place that was looked at and left alone."""

    pass_name: str
    rule: str
    target: str
    reason: str


@dataclass(frozen=True)
class PassRecord:
    """One pass of the run: what it applied, how the result was checked, how long it took.

    Attributes:
        spec: the pass with its options, as a user would type it.
        state: `checked`, `proved`, `not checked`, `failed` or `nothing to do`.
        verdict: the check in words.
        nodes: graph size before and after.
    """

    name: str
    spec: str
    exactness: str
    applied: int
    skipped: int
    state: str
    verdict: str
    nodes: tuple[int, int]
    seconds: float


@dataclass(frozen=True)
class QualityRecord:
    """One metric on one split.

    Attributes:
        split: `choosing` or `reporting`.
        better: `lower` or `higher`.
        original: the metric of the original model.
        difference: value minus original, measured in pairs; `stderr` is its standard error.
        limit: the budget in words, or "".
        met: whether the budget holds here, None without a budget.
        count: how many rows or tokens were measured.
    """

    metric: str
    split: str
    better: str
    original: float
    value: float
    difference: float
    stderr: float
    count: int
    limit: str = ""
    met: bool | None = None


@dataclass(frozen=True)
class CostRecord:
    """What a program costs.

    Attributes:
        flops: floating-point operations (2 per multiply-add) at `sizes`.
        file_bytes: bytes of the largest exported file set, 0 when nothing was written.
    """

    parameters: int
    bytes: int
    flops: float
    sizes: dict[str, int]
    kv_bytes_per_token: int
    nodes: int
    file_bytes: int = 0


@dataclass(frozen=True)
class LatencyRecord:
    """One comparison of original and result in one runner; times in milliseconds, medians.

    Attributes:
        ratio: median of the per-round ratios optimized / original; below 1 is faster.
        spread: quartiles of those ratios.
        failure: why the runner gave no figure, or "".
    """

    runner: str
    sizes: str
    original_ms: float
    optimized_ms: float
    ratio: float
    spread: tuple[float, float]
    failure: str = ""


@dataclass(frozen=True)
class Recipe:
    """How to get the same result again from the same model.

    Attributes:
        passes: per pass its spec and the keys of the actions that were applied.
        model_digest: SHA-256 of the source's weights; `graph_digest`: of the traced graph.
        data_digest: SHA-256 of the data, or "".
    """

    passes: list[tuple[str, list[str]]]
    model: str
    model_digest: str
    graph_digest: str
    data_digest: str
    seed: int
    version: str


@dataclass(frozen=True)
class RunRecord:
    """Everything a run leaves for reports.

    Attributes:
        verdict: `met`, `missed`, `no budget` or `dry run`.
        layers: the per-layer table of the original model.
        curves: quality against share removed: the run's own path, and others to compare it with.
        dims: named dimensions with their ranges in words.
        machine: CPU, threads, versions.
    """

    version: str
    command: str
    model: str
    model_kind: str
    model_digest: str
    data: str
    data_digest: str
    budget: str
    verdict: str
    before: CostRecord
    after: CostRecord
    dims: dict[str, str]
    passes: list[PassRecord]
    actions: list[ActionRecord]
    skips: list[SkipRecord]
    quality: list[QualityRecord]
    branches: list[BranchRecord]
    matrices: list[Matrix]
    latency: list[LatencyRecord]
    recipe: Recipe
    notes: list[str]
    machine: dict[str, str]
    seconds: float
    curves: list[Curve] = field(default_factory=list)
    layers: list[LayerRecord] = field(default_factory=list)

    def to_json(self) -> str:
        """Returns the record as JSON text, indented, with stable key order."""
        return json.dumps(asdict(self), indent=1, allow_nan=True)
