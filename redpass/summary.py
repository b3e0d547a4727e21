"""Turns a run into its record: costs, branches, heat maps, recipe, machine."""

from __future__ import annotations

import hashlib
import itertools
import math
import platform
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TypeVar

import torch

import redpass
from redpass.analysis import (
    AngularDistance,
    BlockInfluence,
    BranchEntropy,
    Cka,
    Similarity,
    angular_distance,
    block_influence,
    branch_entropy,
    cka,
    cost,
    similarity,
    structure,
)
from redpass.analysis.blocks import blocks
from redpass.budget.spec import Budget
from redpass.config import Settings
from redpass.data import Splits
from redpass.errors import DataError
from redpass.facts import Analysis, Facts
from redpass.passes.spec import format_pass
from redpass.plan import Pass
from redpass.program import Program
from redpass.record import ActionRecord, BranchRecord, LayerRecord, Matrix

T = TypeVar("T")


@dataclass(frozen=True)
class Redundancy:
    """What one calibration run told about a program, for its tables and maps."""

    similarity: Similarity
    influence: BlockInfluence
    distance: AngularDistance
    cka: Cka
    entropy: BranchEntropy


def numbered(actions: Sequence[ActionRecord]) -> list[ActionRecord]:
    """Returns the actions with those that were applied numbered in order: some gave way again."""
    counter = itertools.count(1)
    return [replace(a, number=next(counter)) if a.outcome == "applied" else a for a in actions]


def measured_redundancy(facts: Facts) -> Redundancy | None:
    """Returns what the calibration data tell of branches and layers, None without data."""
    if facts.calibration is None:
        return None
    return Redundancy(
        facts.get(similarity),
        facts.get(block_influence),
        facts.get(angular_distance),
        _unless_few(facts, cka, Cka()),
        _unless_few(facts, branch_entropy, BranchEntropy({}, {})),
    )


def _unless_few(facts: Facts, analysis: Analysis[T], nothing: T) -> T:
    """What an analysis finds, or nothing when the data are too few for it."""
    try:
        return facts.get(analysis)
    except DataError:
        return nothing


def branch_records(
    program: Program,
    sizes: dict[str, int],
    measured: Redundancy | None,
    dropped: Collection[str] = (),
) -> list[BranchRecord]:
    """Returns the per-branch table of `program`.

    Args:
        dropped: labels of branches, layers (`layers.3`) and spans (`layers.3-5`) that are gone.
    """
    facts = Facts(program)
    shares = facts.get(cost).by_branch
    known = {name: sizes[name] for name in program.signature.dims if name in sizes}
    cosines = {k: v.cosine for k, v in measured.similarity.branches.items()} if measured else {}
    entropies = measured.entropy.branches if measured else {}
    layers = blocks(program)
    gone = layers_within([block.label for block in layers], dropped)
    inside = {b.label for block in layers if block.label in gone for b in block.branches}
    return [
        BranchRecord(
            branch.label,
            branch.kind,
            branch.layer,
            shares[branch.label].parameters,
            float(shares[branch.label].flops(known)),
            cosines.get(branch.label),
            "dropped" if branch.label in dropped or branch.label in inside else "kept",
            entropies.get(branch.label),
        )
        for branch in facts.get(structure).branches
    ]


def layers_within(labels: Sequence[str], places: Collection[str]) -> set[str]:
    """Returns which of the layers are among the places, or in a span (`layers.3-5`) that is."""
    found = {label for label in labels if label in places}
    for place in places:
        first, _, last = place.partition("-")
        end = first[: first.rfind("layers.")] + f"layers.{last}"
        if first in labels and end in labels:
            found.update(labels[labels.index(first) : labels.index(end) + 1])
    return found


def layer_records(
    program: Program, branches: Sequence[BranchRecord], measured: Redundancy | None
) -> list[LayerRecord]:
    """Returns the per-layer table: figures of the calibration run, and its branches' costs."""
    rows = {row.label: row for row in branches}
    influence = measured.influence.layers if measured else {}
    entropy = measured.entropy.layers if measured else {}
    return [
        _layer(block.label, [rows[b.label] for b in block.branches], influence, entropy)
        for block in blocks(program)
    ]


def _layer(
    label: str,
    rows: list[BranchRecord],
    influence: Mapping[str, float],
    entropy: Mapping[str, float],
) -> LayerRecord:
    gone = [row.kind for row in rows if row.outcome != "kept"]
    outcome = "dropped" if len(gone) == len(rows) else f"without {' and '.join(gone)}"
    return LayerRecord(
        label,
        [row.label for row in rows],
        sum(row.parameters for row in rows),
        sum(row.flops for row in rows),
        influence.get(label),
        None,
        entropy.get(label),
        outcome if gone else "kept",
    )


def matrices(measured: Redundancy | None) -> list[Matrix]:
    """Returns the heat maps a report draws."""
    if measured is None:
        return []
    found = [_cosines(measured.similarity), _alignments(measured.cka), _spans(measured.distance)]
    return [matrix for matrix in found if matrix is not None]


def _cosines(measured: Similarity) -> Matrix | None:
    if not measured.labels:
        return None
    title = "Mean cosine between the residual stream's values"
    note = "Light blocks: the stream keeps its direction over many branches."
    values = [list(map(_known, row)) for row in measured.cosines]
    return Matrix(title, list(measured.labels), values, _least(values), 1.0, note=note)


def _alignments(measured: Cka) -> Matrix | None:
    if not measured.labels:
        return None
    title = f"Linear CKA between layers ({measured.estimator})"
    note = "1: the same representation up to rotation, shift and scale."
    values = [list(map(_known, row)) for row in measured.values]
    return Matrix(title, list(measured.labels), values, _least(values), 1.0, note=note)


def _spans(measured: AngularDistance) -> Matrix | None:
    if not measured.layers:
        return None
    count = len(measured.layers)
    values = [[_known(row[n]) for row in measured.distances] for n in range(count)]
    return Matrix(
        "Angular distance over spans of layers",
        [str(n + 1) for n in range(count)],
        values,
        _least(values),
        max((v for row in values for v in row if v is not None), default=1.0),
        columns=list(measured.layers),
        alike="low",
        y_title="layers in the span",
        x_title="first layer of the span",
        note="Angle between the stream before and behind the span, over π. "
        "The lightest cell of a row is the span of that length that turns the stream least.",
    )


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value


def _least(values: list[list[float | None]]) -> float:
    return min((v for row in values for v in row if v is not None), default=0.0)


def machine() -> dict[str, str]:
    """Returns what the figures of a run depend on: processor, threads, versions."""
    return {
        "processor": platform.processor() or platform.machine(),
        "threads": str(torch.get_num_threads()),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def dimension_range(low: int, high: int | None) -> str:
    """Returns a dimension's range in words."""
    return f"{low} or more" if high is None else f"{low} to {high}"


def work_key(
    program: Program,
    passes: Sequence[Pass],
    budget: Budget,
    data: Splits | None,
    settings: Settings,
    sizes: dict[str, int],
    seed: int,
) -> str:
    """Returns what two runs must have in common for one to go on with the other's figures."""
    parts = (data.calibration, data.choosing, data.reporting) if data else ()
    decisive = {k: v for k, v in asdict(settings).items() if k in ("limit", "skip", "check")}
    work = (
        redpass.__version__,
        machine(),
        program.origin.digest,
        program.digest,
        [format_pass(pass_) for pass_ in passes],
        str(budget),
        [
            (part.digest(), [sorted((k, v.shape) for k, v in b.items()) for b in part])
            for part in parts
        ],
        decisive,
        sizes,
        seed,
    )
    return hashlib.sha256(repr(work).encode()).hexdigest()
