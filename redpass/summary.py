"""Turns a run into its record: costs, branches, heat maps, recipe, machine."""

from __future__ import annotations

import platform
from collections.abc import Collection

import torch

from redpass.analysis import cost, structure
from redpass.analysis.similarity import Similarity, similarity
from redpass.facts import Facts
from redpass.program import Program
from redpass.record import BranchRecord, Matrix


def measured_similarity(facts: Facts) -> Similarity | None:
    """Returns branch and layer similarity on the calibration data, None without data."""
    return None if facts.calibration is None else facts.get(similarity)


def branch_records(
    program: Program,
    sizes: dict[str, int],
    measured: Similarity | None,
    dropped: Collection[str] = (),
) -> list[BranchRecord]:
    """Returns the per-branch table of `program`; `dropped` holds the labels that were removed."""
    facts = Facts(program)
    shares = facts.get(cost).by_branch
    known = {name: sizes[name] for name in program.signature.dims if name in sizes}
    return [
        BranchRecord(
            branch.label,
            branch.kind,
            branch.layer,
            shares[branch.label].parameters,
            float(shares[branch.label].flops(known)),
            measured.branches[branch.label].cosine if measured else None,
            "dropped" if branch.label in dropped else "kept",
        )
        for branch in facts.get(structure).branches
    ]


def matrices(measured: Similarity | None) -> list[Matrix]:
    """Returns the heat maps a report draws."""
    if measured is None or not measured.labels:
        return []
    values = [list(row) for row in measured.cosines]
    low = min(min(row) for row in values)
    title = "Mean cosine between the residual stream's values"
    return [Matrix(title, list(measured.labels), values, low, 1.0)]


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
