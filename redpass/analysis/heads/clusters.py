"""Clusters of heads that look at the same tokens, and the head that stands for each.

Hierarchical clustering with average linkage (`scipy.cluster.hierarchy`). What it costs when one
head's probabilities stand for another's is a matrix of its own: `1 - correlation` as in CHAI, or
`head_similarity`'s costs, which also know how much each head matters. The error of a clustering
is the sum over heads of the cost of their representative; its curve over the number of clusters has
an elbow, which CHAI takes for every layer. Here that is one rung of the ladder among others: a
budget decides how many clusters a layer gets.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

EQUAL = 1e-7
"""Heads count as equal when one costs less than this in place of another; a head apart costs 1."""

SLACK = 0.05
"""How much more error, as a share, is taken for one key head less."""


@dataclass(frozen=True)
class Clusters:
    """A partition of the heads of one attention.

    Attributes:
        members: heads of each cluster, rising; clusters in the order of their first head.
        representatives: for each cluster the member whose queries and keys stay.
        error: sum over heads of what their representative costs.
    """

    members: tuple[tuple[int, ...], ...]
    representatives: tuple[int, ...]
    error: float = 0.0

    @property
    def of_head(self) -> tuple[int, ...]:
        """Which cluster each head is in."""
        found = {head: c for c, heads in enumerate(self.members) for head in heads}
        return tuple(found[head] for head in sorted(found))


def clusters(costs: Tensor, count: int, groups: Sequence[Sequence[int]] = ()) -> Clusters:
    """Puts heads into `count` clusters.

    Args:
        costs: `[heads, heads]`, of letting the column's head stand for the row's.
        groups: heads that share a key head; representatives are chosen so that few are needed.
    """
    from scipy.cluster.hierarchy import linkage
    from scipy.spatial.distance import squareform

    costs = costs.clamp_min(0).fill_diagonal_(0)
    distances = torch.minimum(costs, costs.T)
    tree = linkage(squareform(distances.numpy(), checks=False), method="average")
    labels = _cut(tree, len(costs), count)
    return with_representatives(costs, labels, groups)


def _cut(tree: np.ndarray, heads: int, count: int) -> list[int]:
    """Undoes the last merges until `count` clusters are left; ties give exactly as many."""
    parts = {head: [head] for head in range(heads)}
    for number, row in enumerate(tree[: heads - count]):
        left, right = int(row[0]), int(row[1])
        parts[heads + number] = parts.pop(left) + parts.pop(right)
    labels = [0] * heads
    for number, members in enumerate(parts.values()):
        for head in members:
            labels[head] = number
    return labels


def with_representatives(
    costs: Tensor, labels: Sequence[int], groups: Sequence[Sequence[int]] = ()
) -> Clusters:
    """Returns the clusters that `labels` say, each with the member that stands best for the others.

    Args:
        costs: as for `clusters`.
        labels: cluster of each head, any numbers.
        groups: as for `clusters`.
    """
    order = list(dict.fromkeys(labels))
    members = [tuple(h for h, own in enumerate(labels) if own == label) for label in order]
    group_of = {head: g for g, heads in enumerate(groups) for head in heads}
    allowed = set(group_of.values()) if groups else {0}
    chosen, error = _chosen(costs, members, group_of, allowed)
    for group in sorted(allowed, reverse=True) if len(allowed) > 1 else ():
        used = {group_of[head] for head in chosen}
        if group not in used or not _can_do_without(members, group_of, used - {group}):
            continue
        fewer, worse = _chosen(costs, members, group_of, used - {group})
        if worse <= (1 + SLACK) * error + EQUAL * len(labels):
            chosen, error = fewer, worse
    return Clusters(tuple(members), chosen, error)


def _can_do_without(
    members: Iterable[Sequence[int]], group_of: dict[int, int], allowed: set[int]
) -> bool:
    return all(any(group_of[head] in allowed for head in heads) for heads in members)


def _chosen(
    costs: Tensor, members: Sequence[Sequence[int]], group_of: dict[int, int], allowed: set[int]
) -> tuple[tuple[int, ...], float]:
    """The best member of each cluster among those of allowed groups; the first of equals."""
    found, total = [], 0.0
    for heads in members:
        able = [head for head in heads if group_of.get(head, 0) in allowed]
        sums = {head: float(costs[list(heads), head].sum()) for head in able}
        least = min(sums.values())
        found.append(next(head for head in able if sums[head] <= least + EQUAL))
        total += sums[found[-1]]
    return tuple(found), total


def errors(costs: Tensor) -> list[float]:
    """Returns the error at 1, 2, ... clusters, up to one for each head."""
    return [clusters(costs, count).error for count in range(1, len(costs) + 1)]


def elbow(curve: Sequence[float]) -> int:
    """Returns the count at which a falling curve is farthest below the line between its ends.

    Args:
        curve: error at 1, 2, ... clusters.
    """
    first, last = curve[0], curve[-1]
    steps = max(len(curve) - 1, 1)
    gaps = [first + (last - first) * n / steps - value for n, value in enumerate(curve)]
    return 1 + max(range(len(curve)), key=gaps.__getitem__)


def equal_count(costs: Tensor) -> int:
    """Returns how many clusters there are when only equal heads are put together."""
    curve = errors(costs)
    return next(n + 1 for n, error in enumerate(curve) if error <= EQUAL * len(curve))


def random_clusters(like: Clusters, costs: Tensor, seed: int) -> Clusters:
    """Returns clusters of the same sizes with members drawn by chance: a control."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(costs), generator=generator).tolist()
    labels, start = [0] * len(order), 0
    for number, heads in enumerate(like.members):
        for head in order[start : start + len(heads)]:
            labels[head] = number
        start += len(heads)
    return with_representatives(costs.clamp_min(0), labels)
