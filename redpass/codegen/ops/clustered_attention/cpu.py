"""Clustered attention on the CPU: the weights of a cluster are computed once.

PyTorch's fused attention leaves its fast path where values are wider than keys, so it cannot share
weights. Two matrix products and a softmax, on as many queries at a time as fit in the cache, do.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from redpass.codegen.ops.clustered_attention.reference import (
    chosen_heads,
    clustered_attention,
    seen_keys,
    spread,
)

AT_ONCE = 2**20
"""Scores held at a time, about 4 MB."""

WIDE = (torch.float32, torch.float64)
"""Where scores may be rounded to their own dtype before the softmax, as they are here."""


def shared_weights(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    clusters: Sequence[int],
    keys: Sequence[int],
    values: Sequence[int],
    mask: Tensor | None,
    causal: bool,
    offset: int,
    scale: float | None,
) -> Tensor:
    """Returns what `clustered_attention` does, by the same arguments."""
    (batch, count, queries, width), heads = q.shape, len(clusters)
    if heads == count or q.dtype not in WIDE:
        rest = (clusters, keys, values, mask, causal, offset, scale)
        return clustered_attention(q, k, v, *rest)
    mask = seen_keys(q, k, mask, causal, offset)
    k = chosen_heads(k, spread(keys, count, k.shape[1]))
    v = chosen_heads(v, spread(values, heads, v.shape[1]))
    out = q.new_empty((batch, heads, queries, v.shape[3]))
    step = max(1, AT_ONCE // max(1, batch * count * k.shape[2]))
    q = q * (width**-0.5 if scale is None else scale)
    for start in range(0, queries, step):
        rows = slice(start, start + step)
        weights = _softmax(q[:, :, rows] @ k.mT, mask, rows)
        _weighted(weights, v, list(clusters), out[:, :, rows])
    return out


def _softmax(scores: Tensor, mask: Tensor | None, rows: slice) -> Tensor:
    if mask is None:
        return torch.softmax(scores, -1)
    seen = mask[..., rows, :] if mask.shape[-2] > 1 else mask
    scores = scores.masked_fill(~seen, float("-inf")) if seen.dtype == torch.bool else scores + seen
    weights: Tensor = torch._safe_softmax(scores, -1)
    return weights


def _weighted(weights: Tensor, v: Tensor, clusters: list[int], out: Tensor) -> None:
    """Writes each head's weighted values.

    One product for each place in a cluster, rather than one for all: that would copy the weights,
    which costs more than calls do, but for a single query.
    """
    count, heads = weights.shape[1], len(clusters)
    if weights.shape[2] == 1 or clusters != spread([], heads, count) or heads % count:
        out.copy_(torch.matmul(weights[:, clusters], v))
        return
    wide, results = v.unflatten(1, (count, -1)), out.unflatten(1, (count, -1))
    for index in range(heads // count):
        results[:, :, index] = torch.matmul(weights, wide[:, :, index])
