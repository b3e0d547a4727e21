"""Attention whose heads share score matrices, in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


def clustered_attention(
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
    """Returns for head h: `softmax(scale q[c] k[keys[c]]^T + mask) v[values[h]]`, c = clusters[h].

    It gathers queries, keys and values for all heads, which is right and saves nothing.

    Args:
        q: [b, c, s, d], one query head for each cluster.
        k: [b, g, t, d], key heads; c is a multiple of g, or `keys` says which reads which.
        v: [b, n, t, e], value heads; h is a multiple of n, or `values` says which reads which.
        clusters: the cluster of each of the h heads of the result.
        keys: the key head of each cluster; empty: spread evenly, in order.
        values: the value head of each head; empty: spread evenly, in order.
        mask: added to the scores, or boolean with True where a key is seen; it broadcasts to
            [b, c, s, t]. A row that sees no key gives zeros.
        causal: query i sees keys 0 to i + offset.
        offset: position of the first query, for `causal`.
        scale: None for 1 / sqrt(d).

    Returns:
        [b, h, s, e].
    """
    keys = spread(keys, q.shape[1], k.shape[1])
    values = spread(values, len(clusters), v.shape[1])
    mask = seen_keys(q, k, mask, causal, offset)
    if mask is not None and mask.dim() == 4 and mask.shape[1] > 1:
        mask = mask[:, list(clusters)]
    return scaled_dot_product_attention(
        chosen_heads(q, list(clusters)),
        chosen_heads(k, [keys[cluster] for cluster in clusters]),
        chosen_heads(v, values),
        attn_mask=mask,
        scale=scale,
    ).contiguous()


def chosen_heads(x: Tensor, chosen: list[int]) -> Tensor:
    """Returns some heads in some order, without a copy where these are all of them."""
    return x if chosen == list(range(x.shape[1])) else x[:, chosen]


def spread(readers: Sequence[int], count: int, heads: int) -> list[int]:
    """Returns which of `heads` each of `count` readers reads: as told, else evenly in order."""
    return list(readers) if readers else [index * heads // count for index in range(count)]


def seen_keys(
    q: Tensor, k: Tensor, mask: Tensor | None, causal: bool, offset: int
) -> Tensor | None:
    """Returns the mask with the causal limit in it, None where all is seen."""
    if not causal:
        return mask
    rows = torch.arange(q.shape[-2], device=q.device)[:, None] + offset
    seen = torch.arange(k.shape[-2], device=q.device) <= rows
    if mask is None:
        return seen
    return mask & seen if mask.dtype == torch.bool else mask.masked_fill(~seen, float("-inf"))
