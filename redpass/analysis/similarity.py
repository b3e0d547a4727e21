"""Branch and layer similarity: how little a branch turns the residual stream.

One streaming run over the calibration data. Every accumulator is a sum over tokens, so memory is
bounded by one batch's stream values plus a few numbers a branch.

Sources: Block Influence, `1 - E cos(x_i, x_{i+1})` (ShortGPT, Men et al. 2024); the same for one
attention or feed-forward branch alone (LLM-Drop, He et al. 2024).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, fx

from redpass.analysis.structure import Branch, Structure, structure
from redpass.data import Batch, Batches
from redpass.errors import DataError
from redpass.facts import Facts
from redpass.program import Program, interpret
from redpass.verify.inputs import complete


@dataclass(frozen=True)
class BranchSimilarity:
    """What one branch does to the stream, averaged over tokens.

    Attributes:
        cosine: mean cosine between the stream with and without the branch's contribution.
        relative_norm: mean of `|b| / |x'|`, the size of the contribution.
        tokens: how many tokens were counted.
    """

    cosine: float
    relative_norm: float
    tokens: int


@dataclass(frozen=True)
class Similarity:
    """Branch label -> its similarity; and mean cosines between the stream's values.

    Attributes:
        labels: one a stream value, in order.
        cosines: `[i][j]`, mean cosine over tokens between stream values i and j.
    """

    branches: Mapping[str, BranchSimilarity]
    labels: tuple[str, ...]
    cosines: tuple[tuple[float, ...], ...]


def similarity(program: Program, facts: Facts) -> Similarity:
    """Measures all branches and stream values on the calibration data.

    Raises:
        DataError: no calibration data, or a branch whose values are NaN or infinite (named).
    """
    found, data = facts.get(structure), facts.data()
    kept = facts.recall("similarity", lambda: asdict(measure(program, found, data)))
    branches = {label: BranchSimilarity(**figures) for label, figures in kept["branches"].items()}
    return Similarity(branches, tuple(kept["labels"]), tuple(map(tuple, kept["cosines"])))


def measure(program: Program, found: Structure, data: Batches) -> Similarity:
    """Runs `data` through `program` once and sums up what `Similarity` holds."""
    sums = _Sums(found)
    watched = sums.watched()
    for batch in data:
        values: dict[str, Tensor] = {}

        def watch(node: fx.Node, value: Any, seen: dict[str, Tensor] = values) -> Any:
            if node.name in watched:
                seen[node.name] = value
            return value

        values_by_name = complete(program, batch)
        names = [port.name for port in program.signature.inputs]
        interpret(program, [values_by_name[name] for name in names], watch)
        sums.add(values, batch)
    return sums.result()


class _Sums:
    def __init__(self, found: Structure) -> None:
        self.branches = found.branches
        self.stream = _stream_values(found)
        self.cosine = dict.fromkeys((b.label for b in found.branches), 0.0)
        self.norm = dict(self.cosine)
        self.tokens = 0.0
        size = len(self.stream)
        self.pairs = torch.zeros(size, size, dtype=torch.float64)

    def watched(self) -> set[str]:
        names = set(self.stream)
        for branch in self.branches:
            names |= {branch.exit, _total(branch)}
        return names

    def add(self, values: Mapping[str, Tensor], batch: Batch) -> None:
        weights: Tensor | None = None
        for branch in self.branches:
            total = _rows(values[_total(branch)])
            part = _rows(values[branch.exit])
            weights = token_weights(batch, values[_total(branch)])
            cosine = torch.cosine_similarity(total - part, total, dim=-1)
            ratio = part.norm(dim=-1) / total.norm(dim=-1).clamp_min(1e-30)
            self.cosine[branch.label] += _weighted(cosine, weights, branch.label)
            self.norm[branch.label] += _weighted(ratio, weights, branch.label)
        if weights is not None:
            self.tokens += float(weights.sum())
            self._add_pairs(values, weights)

    def _add_pairs(self, values: Mapping[str, Tensor], weights: Tensor) -> None:
        rows = [torch.nn.functional.normalize(_rows(values[name]), dim=-1) for name in self.stream]
        if not rows or any(row.shape != rows[0].shape for row in rows):
            return  # a stream that changes its width has no cosines between stages
        stages = torch.stack([row * weights.sqrt()[:, None] for row in rows]).flatten(1)
        self.pairs += stages @ stages.T

    def result(self) -> Similarity:
        count = max(self.tokens, 1.0)
        branches = {
            label: BranchSimilarity(
                self.cosine[label] / count, self.norm[label] / count, int(count)
            )
            for label in self.cosine
        }
        labels = ("input", *(f"after {name}" for name in _stream_labels(self.branches)))
        cosines = tuple(tuple(row) for row in (self.pairs / count).tolist())
        return Similarity(branches, labels[: len(self.stream)], cosines)


def token_weights(batch: Batch, value: Tensor) -> Tensor:
    """Returns 1 for each row of `value` flattened to [tokens, d], 0 where it is padding.

    Padding is what an `attention_mask` of the batch's shape marks with 0; a mask that also covers
    cached positions is cut to the last ones.
    """
    rows = value.shape[:-1]
    mask = batch.get("attention_mask")
    if mask is None or mask.dim() != 2 or len(rows) != 2 or mask.shape[0] != rows[0]:
        return torch.ones(rows.numel(), dtype=torch.float64)
    if mask.shape[1] < rows[1]:
        return torch.ones(rows.numel(), dtype=torch.float64)
    return mask[:, mask.shape[1] - rows[1] :].reshape(-1).to(torch.float64)


def _rows(value: Tensor) -> Tensor:
    return value.reshape(-1, value.shape[-1]).to(torch.float64)


def _weighted(values: Tensor, weights: Tensor, label: str) -> float:
    if weights.shape != values.shape:
        weights = torch.ones_like(values)
    total = float((values * weights).sum())
    if total != total or abs(total) == float("inf"):
        raise DataError("its values on the calibration data are NaN or infinite", place=label)
    return total


def _total(branch: Branch) -> str:
    """The stream value that holds the branch's contribution, before any norm after the add."""
    return branch.join if branch.form == "post-norm" else branch.after


def _stream_values(found: Structure) -> tuple[str, ...]:
    """The stream before the first branch, then after each one, without repetitions."""
    if not found.branches:
        return ()
    names = [found.branches[0].entry, *(branch.after for branch in found.branches)]
    return tuple(dict.fromkeys(names))


def _stream_labels(branches: tuple[Branch, ...]) -> list[str]:
    last = {branch.after: branch.label for branch in branches}
    return [last[name] for name in dict.fromkeys(branch.after for branch in branches)]
