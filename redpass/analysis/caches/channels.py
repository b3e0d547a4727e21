"""Which channels of keys move scores most.

Source: ThinK (Xu et al. 2024, arXiv:2407.21018): a channel counts by the norm of its queries times
the norm of its keys.
"""

from __future__ import annotations

import torch
from torch import Tensor

from redpass.analysis.caches.bases import key_basis, query_blocks, way_back
from redpass.analysis.caches.moments import Moments
from redpass.analysis.caches.parts import Factors
from redpass.analysis.caches.sites import CacheSide

ORDERS = ("product", "keys", "random")


def kept_channels(
    cache: CacheSide, moments: Moments, count: int, order: str, *, refit: bool
) -> tuple[Factors, float]:
    """Returns factors that pick `count` channels of each key head, and their predicted loss.

    Args:
        moments: of single heads.
        order: one of `ORDERS`.
        refit: whether the kept channels of queries also do what they can for those that go.
    """
    basis = key_basis(cache, moments, "activations", rebuilt=False, refit=False)
    strengths = _strengths(cache, moments, order)
    kept = strengths.argsort(dim=1, descending=True, stable=True)[:, :count].sort(dim=1).values
    down = torch.eye(cache.width, dtype=torch.float64)[kept]
    factors = Factors(down, way_back(down, basis.gram) if refit else down.mT)
    return factors, basis.loss(factors)


def _strengths(cache: CacheSide, moments: Moments, order: str) -> Tensor:
    """`[heads, width]`."""
    if order == "random":
        generator = torch.Generator().manual_seed(cache.site.branch.layer)
        return torch.rand(cache.heads, cache.width, generator=generator)
    keys = moments.gram.diagonal(dim1=1, dim2=2)
    if order == "keys":
        return keys
    return keys * query_blocks(cache, moments).diagonal(dim1=1, dim2=2)
