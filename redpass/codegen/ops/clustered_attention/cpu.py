"""Clustered attention on the CPU, without copies of keys and values.

PyTorch's fused attention takes heads that read the same memory: clusters become its batch, and
queries and keys are expanded in place of being gathered. For few queries, two products and a
softmax with each cluster's weights computed once are faster still.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from redpass.codegen.ops.clustered_attention.reference import (
    chosen_heads,
    clustered_attention,
    seen_keys,
    spread,
)

FEW_QUERIES = 16
"""Up to so many, fused attention is slower than separate products (`benchmarks/op_overhead.py`)."""

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
    count, heads = q.shape[1], len(clusters)
    if heads == count or q.shape[2] > FEW_QUERIES or q.dtype not in WIDE:
        return without_copies(q, k, v, clusters, keys, values, mask, causal, offset, scale)
    mask = seen_keys(q, k, mask, causal, offset)
    k = chosen_heads(k, spread(keys, count, k.shape[1]))
    v = chosen_heads(v, spread(values, heads, v.shape[1]))
    q = q * (q.shape[3] ** -0.5 if scale is None else scale)
    weights = _softmax(q @ k.mT, mask)
    out: Tensor = weights[:, list(clusters)] @ v
    return out


def _softmax(scores: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return torch.softmax(scores, -1)
    hidden = mask.dtype == torch.bool
    scores = scores.masked_fill(~mask, float("-inf")) if hidden else scores + mask
    weights: Tensor = torch._safe_softmax(scores, -1)
    return weights


def without_copies(
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
    """Returns what `clustered_attention` does by one fused attention that gathers no keys.

    Heads that are not spread evenly and in order are gathered after all.
    """
    (count, groups, wide), heads = (t.shape[1] for t in (q, k, v)), len(clusters)
    even = count % groups == 0 and heads % count == 0 and heads % wide == 0 and wide % groups == 0
    maps = ((clusters, heads, count), (keys, count, groups), (values, heads, wide))
    if not even or any(list(told or spread([], n, m)) != spread([], n, m) for told, n, m in maps):
        rest = (clusters, keys, values, mask, causal, offset, scale)
        return clustered_attention(q, k, v, *rest)
    mask = seen_keys(q, k, mask, causal, offset)
    if mask is not None and mask.dim() == 4:
        mask = _grouped(mask.expand(q.shape[0], count, -1, -1), groups, heads)
    sizes = (q.shape[0], heads, q.shape[2], v.shape[3])
    q, k, v = (_grouped(t, groups, heads) for t in (q, k, v))
    return scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale).reshape(sizes)


def _grouped(x: Tensor, groups: int, heads: int) -> Tensor:
    """[b, n, s, d] -> [b groups, heads / groups, s, d], each of the n repeated in place."""
    if x.shape[1] not in (groups, heads):
        x = x.repeat_interleave(heads // x.shape[1], 1)
    batch, count, length, width = x.shape
    parts = x.reshape(batch * groups, count // groups, length, width)
    return parts if count == heads else parts.expand(-1, heads // groups, -1, -1)
