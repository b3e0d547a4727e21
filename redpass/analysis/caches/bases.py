"""What to keep of keys and values, at every rank, and what that costs the residual stream.

Keys count by what they do to scores `q k`: with `S Sᵀ = E[q qᵀ]` over the queries that meet them,
the directions to keep are the principal ones of `Sᵀ k`. Values count by what the output projection
makes of them, so `S Sᵀ = W_oᵀ W_o`. Keys that are rebuilt before a rotation only take their
heads' strength as a metric: that commutes with any rotation.

The part of keys that all positions share moves no attention, as the softmax takes it out; that of
values goes into the bias behind, as attention sums to one. So both are centred, except where keys
are rebuilt.

Source: Palu (Chang et al. 2024, arXiv:2407.21118) for groups of heads whose latents are kept, with
the whitening of SVD-LLM; the metrics are those of the products that read what is kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from redpass.analysis.caches.moments import Moments
from redpass.analysis.caches.parts import Factors
from redpass.analysis.caches.sites import CacheSide
from redpass.analysis.heads.axes import Unfit
from redpass.analysis.ranks.whitening import decompose

BASES = ("outputs", "activations", "weights", "random")
"""Metric of what reads the cache; of what is kept alone; truncation of the weights; a control."""

TINY = 1e-12


@dataclass(frozen=True, eq=False)
class Basis:
    """The directions of one cache, the most important first.

    Attributes:
        metrics: `S` of every group, `[groups, width, width]`, symmetric.
        vectors: orthonormal columns for every group, in the metric's space; likewise.
        gram: second moments of what is kept, centred where `mean` is given; likewise.
        mean: `[groups, width]`, or None.
        refit: whether `up` is fitted to `down` by least squares on `gram`.
        loss_of: predicted loss of errors with these second moments.
    """

    metrics: Tensor
    vectors: Tensor
    gram: Tensor
    mean: Tensor | None
    refit: bool
    loss_of: Callable[[Tensor], float]

    def factors(self, rank: int) -> Factors:
        """Returns what to keep at a rank, and how to get the rest back."""
        kept = self.vectors[:, :, :rank]
        down = kept.mT @ self.metrics
        up = torch.linalg.pinv(self.metrics, rtol=TINY, hermitian=True) @ kept
        if self.refit and rank < kept.shape[1]:
            up = way_back(down, self.gram)
        if self.mean is None:
            return Factors(down, up)
        lost = self.mean - (up @ down @ self.mean.unsqueeze(2)).squeeze(2)
        is_noise = lost.abs() <= 1e-9 * self.mean.abs().max()
        return Factors(down, up, torch.where(is_noise, 0.0, lost))

    def loss(self, factors: Factors) -> float:
        """Returns the predicted squared error in the stream over its squared size."""
        left = torch.eye(self.gram.shape[1], dtype=self.gram.dtype) - factors.up @ factors.down
        return self.loss_of(left @ self.gram @ left.mT)


def way_back(down: Tensor, gram: Tensor) -> Tensor:
    """Returns `up` with the least `E || v - up down v ||²` for `E[v vᵀ] = gram`, by groups."""
    inner = torch.linalg.pinv(down @ gram @ down.mT, rtol=TINY, hermitian=True)
    found: Tensor = (inner @ down @ gram).mT
    return found


def key_basis(
    cache: CacheSide, moments: Moments, name: str, *, rebuilt: bool, refit: bool
) -> Basis:
    """Returns the directions of keys, as the attention reads them or before they are rotated.

    Args:
        name: one of `BASES`.

    Raises:
        Unfit: the weights are asked for, and none make these keys.
    """
    groups, width = moments.gram.shape[:2]
    size = width // cache.width
    strengths = query_blocks(cache, moments)
    blocks = strengths.unflatten(0, (groups, size))
    if rebuilt:
        energy = blocks.diagonal(dim1=2, dim2=3).mean(-1, keepdim=True)
        blocks = torch.diag_embed(energy.expand(groups, size, cache.width))
    metrics = _roots(torch.stack([torch.block_diag(*group) for group in blocks]))
    gram = moments.split_gram if rebuilt else moments.covariance
    scale = cache.site.core.factor or cache.width**-0.5

    def loss(error: Tensor) -> float:
        each = torch.stack([_diagonal_blocks(part, size) for part in error]).flatten(0, 1)
        scores = scale**2 * float((each * strengths).sum()) / cache.site.heads
        return moments.share * -math.expm1(-max(scores, 0.0))

    made = cache.is_split_plain if rebuilt else cache.is_moved_only
    metrics, vectors = _directions(cache, metrics, gram, name, made)
    return Basis(metrics, vectors, gram, None, refit, loss)


def value_basis(cache: CacheSide, moments: Moments, name: str, *, refit: bool) -> Basis:
    """Returns the directions of values. Arguments as for `key_basis`."""
    groups, width = moments.gram.shape[:2]
    size = width // cache.width
    weight = cache.site.output_weight().double()
    products = torch.einsum("ohd,ohe->hde", weight, weight)
    of_head = torch.tensor(cache.side.of_head)
    each = products.new_zeros(cache.heads, *products.shape[1:]).index_add(0, of_head, products)
    blocks = each.unflatten(0, (groups, size))
    metric = torch.stack([torch.block_diag(*group) for group in blocks])
    gram = moments.covariance
    whole = float((metric * gram).sum())

    def loss(error: Tensor) -> float:
        part = float((metric * error).sum())
        return moments.share * max(part, 0.0) / whole if whole > 0 else 0.0

    metrics, vectors = _directions(cache, _roots(metric), gram, name, cache.is_moved_only)
    return Basis(metrics, vectors, gram, moments.mean, refit, loss)


def query_blocks(cache: CacheSide, moments: Moments) -> Tensor:
    """Returns `[heads, width, width]`: second moments of all queries that meet each key head."""
    if moments.queries is None:
        return torch.eye(cache.width, dtype=torch.float64).expand(cache.heads, -1, -1)
    of_head = torch.tensor(cache.side.of_head)
    empty = moments.queries.new_zeros(cache.heads, *moments.queries.shape[1:])
    return empty.index_add(0, of_head, moments.queries)


def _diagonal_blocks(matrix: Tensor, count: int) -> Tensor:
    parts = matrix.unflatten(0, (count, -1)).unflatten(2, (count, -1))
    return torch.stack([parts[i, :, i] for i in range(count)])


def _roots(matrices: Tensor) -> Tensor:
    """Symmetric square roots."""
    values, vectors = torch.linalg.eigh((matrices + matrices.mT) / 2)
    found: Tensor = (vectors * values.clamp_min(0.0).sqrt().unsqueeze(1)) @ vectors.mT
    return found


def _directions(
    cache: CacheSide, metrics: Tensor, gram: Tensor, name: str, plain_weights: bool
) -> tuple[Tensor, Tensor]:
    """Metrics and directions for one of `BASES`.

    Args:
        plain_weights: whether weights alone make what the directions are about.
    """
    groups, width = gram.shape[:2]
    plain = torch.eye(width, dtype=torch.float64).expand(groups, -1, -1)
    if name == "outputs":
        return metrics, _stacked(metrics, gram)
    if name == "activations":
        return plain, _stacked(plain, gram)
    if name == "random":
        generator = torch.Generator().manual_seed(cache.site.branch.layer)
        drawn = torch.randn(groups, width, width, dtype=torch.float64, generator=generator)
        return plain, torch.linalg.qr(drawn).Q
    if not plain_weights:
        raise Unfit("no weights alone make what is kept")
    rows = cache.side.weight(cache.site.program).double().flatten(0, 1).unflatten(0, (groups, -1))
    return plain, _stacked(rows @ rows.mT, None)


def _stacked(metrics: Tensor, gram: Tensor | None) -> Tensor:
    found = [
        decompose(metric, None if gram is None else (gram[i] + gram[i].T) / 2)
        for i, metric in enumerate(metrics)
    ]
    return torch.stack([each.left(len(each.matrix)) for each in found])
