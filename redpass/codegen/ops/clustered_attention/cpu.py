"""Clustered attention on the CPU: shared heads are read where they lie, wherever that is faster.

PyTorch's fused attention takes heads that read the same memory: clusters become its batch, and
queries and keys are expanded in place of being gathered. That needs heads that are spread evenly
and in order, and batches that lie close together; in all other cases heads are gathered as they
were in the graph that the op came from. Few queries on many keys in uneven clusters run as two
products and a softmax, with each cluster's weights computed once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.nn.functional import scaled_dot_product_attention

from redpass.codegen.ops.clustered_attention.reference import seen_keys, spread

FEW_QUERIES = 16
MANY_KEYS = 256
"""From so many on, with few queries, weights that are computed once a cluster pay for the calls
of separate products (`benchmarks/op_overhead.py`)."""

WIDE = (torch.float32, torch.float64)
"""Where scores may be rounded to their own dtype before the softmax, as they are here."""


def shared_heads(
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
    tables = head_tables(q, k, v, clusters, keys, values)
    rest = (clusters, keys, values, mask, causal, offset, scale)
    return attend(q, k, v, *rest, *tables).contiguous()


def head_tables(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    clusters: Sequence[int],
    keys: Sequence[int],
    values: Sequence[int],
    *others: object,
) -> list[Tensor]:
    """Returns nothing where heads are spread evenly and in order, else which head reads which.

    Returns:
        For each head of the result its cluster and its value head, for each cluster its key head,
        for each head its key head. A table that changes nothing is empty, and none at the end.
    """
    del others
    (count, groups, wide), heads = (t.shape[1] for t in (q, k, v)), len(clusters)
    maps = ((clusters, heads, count), (keys, count, groups), (values, heads, wide))
    even = count % groups == 0 and heads % count == 0 and heads % wide == 0 and wide % groups == 0
    if even and all(list(told or spread([], n, m)) == spread([], n, m) for told, n, m in maps):
        return []
    keys, values = spread(keys, count, groups), spread(values, heads, wide)
    shared = keys == list(range(groups))
    found = [
        list(clusters),
        [] if values == list(range(wide)) else values,
        [] if shared else keys,
        [] if shared else [keys[cluster] for cluster in clusters],
    ]
    while not found[-1]:
        found.pop()
    return [torch.tensor(table, dtype=torch.int64) for table in found]


def attend(
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
    *tables: Tensor,
) -> Tensor:
    """Returns what `clustered_attention` does, whatever the strides; `tables` are `head_tables`."""
    del keys, values  # they are in the tables
    if causal:
        mask = seen_keys(q, k, mask, causal, offset)
    if tables:
        return _uneven(q, k, v, mask, scale, *tables)
    heads, groups = len(clusters), k.shape[1]
    if _lies_close(k) and _lies_close(v):
        return _in_place(q, k, v, mask, scale, heads)
    q = q.repeat_interleave(heads // q.shape[1], 1)
    if mask is not None and mask.dim() == 4 and mask.shape[1] > 1:
        mask = mask.repeat_interleave(heads // mask.shape[1], 1)
    k, v = k.repeat_interleave(heads // groups, 1), v.repeat_interleave(heads // v.shape[1], 1)
    return scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)


def _lies_close(x: Tensor) -> bool:
    """Whether batch and heads become one axis without a copy."""
    return _holds(x.shape[0] == 1) or _holds(x.stride(0) == x.stride(1) * x.shape[1])


def _holds(condition: bool) -> bool:
    """Of sizes that are not known only what holds for all of them."""
    return condition if isinstance(condition, bool) else statically_known_true(condition)


def _in_place(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None, heads: int
) -> Tensor:
    batch, count, queries, _ = q.shape
    groups, width = k.shape[1], v.shape[3]
    if mask is not None and mask.dim() == 4:
        mask = _grouped(mask.expand(batch, count, -1, -1), groups, heads)
    q, k, v = (_grouped(t, groups, heads) for t in (q, k, v))
    found = scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    if _holds(queries == 1):
        return found.reshape(batch, heads, queries, width)
    # One copy, into the order in which a projection reads all heads of a position.
    parts = found.reshape(batch, groups, heads // groups, queries, width)
    return parts.permute(0, 3, 1, 2, 4).reshape(batch, queries, heads, width).transpose(1, 2)


def _grouped(x: Tensor, groups: int, heads: int) -> Tensor:
    """[b, n, s, d] -> [b groups, heads / groups, s, d], each of the n repeated in place."""
    if x.shape[1] not in (groups, heads):
        x = x.repeat_interleave(heads // x.shape[1], 1)
    batch, count, length, width = x.shape
    parts = x.reshape(batch * groups, count // groups, length, width)
    return parts if count == heads else parts.expand(-1, heads // groups, -1, -1)


def _uneven(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float | None,
    to_cluster: Tensor,
    to_value: Tensor | None = None,
    cluster_key: Tensor | None = None,
    to_key: Tensor | None = None,
) -> Tensor:
    v = _chosen(v, to_value)
    few = _holds(k.shape[2] >= MANY_KEYS) and _holds(q.shape[2] <= FEW_QUERIES)
    if few and q.dtype in WIDE and _lies_close(k) and _lies_close(v):
        scores = (q * (q.shape[3] ** -0.5 if scale is None else scale)) @ _chosen(k, cluster_key).mT
        return _chosen(_softmax(scores, mask), to_cluster) @ v
    if mask is not None and mask.dim() == 4 and mask.shape[1] > 1:
        mask = _chosen(mask, to_cluster)
    q, k = q.index_select(1, to_cluster), _chosen(k, to_cluster if to_key is None else to_key)
    return scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)


def _chosen(x: Tensor, table: Tensor | None) -> Tensor:
    return x if table is None or table.shape[0] == 0 else x.index_select(1, table)


def _softmax(scores: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return torch.softmax(scores, -1)
    hidden = mask.dtype == torch.bool
    scores = scores.masked_fill(~mask, float("-inf")) if hidden else scores + mask
    weights: Tensor = torch.ops.aten._safe_softmax.default(scores, -1)
    return weights
