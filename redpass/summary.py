"""Turns a run into its record: costs, branches, heat maps, recipe, machine."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Collection, Sequence
from dataclasses import asdict

import torch

import redpass
from redpass.analysis import cost, structure
from redpass.analysis.similarity import Similarity, similarity
from redpass.budget.spec import Budget
from redpass.config import Settings
from redpass.data import Splits
from redpass.facts import Facts
from redpass.passes.spec import format_pass
from redpass.plan import Pass
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
