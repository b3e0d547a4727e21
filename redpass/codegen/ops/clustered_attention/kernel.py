"""Attention whose heads share score matrices: flash attention with several value heads.

A program computes the scores of a cluster once, in tiles, and multiplies them with the value heads
of the cluster side by side, as one wide V. With few queries, all clusters of a key head are rows of
one tile, so keys and values are read once, and the keys may be cut into parts whose results are
merged by their sums (Dao et al. 2022, arXiv:2205.14135; Agarwal et al. 2024,
arXiv:2403.08058).
"""

import functools

import torch
import triton
import triton.language as tl

from redpass.codegen.ops.clustered_attention.groups import tables
from redpass.codegen.ops.softmax.kernel import inverse, masked, merge_kernel, softened

LOG2E = 1.4426950408889634
ALIGNED = 16
"""Elements: head sizes and strides that are multiples of it let whole lines be read at once."""


@triton.jit
def _attend(acc, top, total, queries, key_at, value_at, mask_at, seen, start, keys, k_row, v_row,
            mask_column, scale, in_depth, in_width, CAUSAL: tl.constexpr, MASK: tl.constexpr,
            EDGE: tl.constexpr, PRECISION: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    """Takes `BLOCK_N` keys and their values into the running softmax of all rows."""
    key = start + tl.arange(0, BLOCK_N)
    at = key.to(tl.int64)
    if EDGE:
        mask_k, mask_v = (key < keys)[:, None] & in_depth, (key < keys)[:, None] & in_width
    else:
        mask_k, mask_v = in_depth, in_width
    tile = tl.load(key_at + at[:, None] * k_row, mask=mask_k, other=0.0)
    scores = tl.dot(queries, tl.trans(tile), input_precision=PRECISION) * scale
    if MASK != 0:
        inside = (seen >= 0)[:, None] & (key < keys)[None, :]
        scores = masked(scores, mask_at + at[None, :] * mask_column, inside, MASK)
    if EDGE:
        limit = keys - 1
        if CAUSAL:
            limit = tl.minimum(seen, limit)[:, None]
        scores = tl.where(key[None, :] <= limit, scores, float("-inf"))
    weights, higher, shrink = softened(scores, top)
    values = tl.load(value_at + at[:, None] * v_row, mask=mask_v, other=0.0)
    acc = tl.dot(weights.to(values.dtype), values, acc * shrink[:, None], input_precision=PRECISION)
    return acc, higher, total * shrink + tl.sum(weights, axis=1)


@triton.jit
def attend_kernel(
    q,
    k,
    v,
    mask,
    out,
    sums,
    table,
    queries,
    keys,
    heads,
    offset,
    scale,
    q_batch,
    q_head,
    q_row,
    k_batch,
    k_head,
    k_row,
    v_batch,
    v_head,
    v_row,
    mask_batch,
    mask_head,
    mask_row,
    mask_column,
    CLUSTERS: tl.constexpr,
    VALUES: tl.constexpr,
    WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    CAUSAL: tl.constexpr,
    MASK: tl.constexpr,
    PRECISION: tl.constexpr,
    HINT: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """One program: `BLOCK_M` rows of a group, over one part of the keys.

    With `SPLITS` > 1 it writes float32 partial results [SPLITS, b, h, s, e] and, to `sums`, the
    largest score of each row and the sum of its weights [2, SPLITS, b, h, s].
    """
    split = tl.program_id(1) % SPLITS
    batch = tl.program_id(2).to(tl.int64)
    entry = table + tl.program_id(1) // SPLITS * (1 + CLUSTERS + VALUES + CLUSTERS * VALUES)
    # Rows are the queries of the group's first cluster, then those of its second, ...
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    slot = row // queries
    place = row - slot * queries
    cluster = tl.load(entry + 1 + slot, mask=row < CLUSTERS * queries, other=-1)
    position = place.to(tl.int64)
    # The last key that a row sees; a row past the end sees none.
    seen = tl.where(cluster < 0, -1, place + offset if CAUSAL else keys - 1)

    depth, wide = tl.arange(0, BLOCK_D), tl.arange(0, VALUES * BLOCK_V)
    dim = wide % BLOCK_V
    value_head = tl.load(entry + 1 + CLUSTERS + wide // BLOCK_V)
    value_column = value_head.to(tl.int64) * v_head + dim
    if HINT:
        # The compiler does not see that a head's columns lie side by side: heads are looked up.
        value_column = tl.max_contiguous(tl.multiple_of(value_column, 16), BLOCK_V)
    in_depth = (depth < WIDTH)[None, :]
    in_width = ((value_head >= 0) & (dim < VALUE_WIDTH))[None, :]
    query_at = q + batch * q_batch + cluster.to(tl.int64) * q_head + position * q_row
    query_tile = tl.load(
        query_at[:, None] + depth[None, :], mask=(cluster >= 0)[:, None] & in_depth, other=0.0
    )
    key_at = k + batch * k_batch + tl.load(entry).to(tl.int64) * k_head + depth[None, :]
    value_at = v + batch * v_batch + value_column[None, :]
    mask_at = mask
    if MASK != 0:
        mask_at = mask + batch * mask_batch + cluster.to(tl.int64) * mask_head + position * mask_row
        mask_at = mask_at[:, None]

    # This part of the keys, and how far into it no row meets a limit.
    part = tl.cdiv(tl.cdiv(keys, SPLITS), BLOCK_N) * BLOCK_N
    begin = split * part
    end = tl.minimum(begin + part, keys)
    free = end
    if CAUSAL:
        end = tl.minimum(end, tl.max(seen) + 1)
        free = tl.minimum(end, tl.min(tl.where(cluster < 0, keys, seen)) + 1)
    end = tl.maximum(end, begin)
    free = begin + tl.maximum(free - begin, 0) // BLOCK_N * BLOCK_N

    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, VALUES * BLOCK_V), tl.float32)
    for start in range(begin, free, BLOCK_N):
        acc, top, total = _attend(
            acc, top, total, query_tile, key_at, value_at, mask_at, seen, start, keys, k_row, v_row,
            mask_column, scale, in_depth, in_width, CAUSAL, MASK, False, PRECISION, BLOCK_N,
        )  # fmt: skip
    for start in range(free, end, BLOCK_N):
        acc, top, total = _attend(
            acc, top, total, query_tile, key_at, value_at, mask_at, seen, start, keys, k_row, v_row,
            mask_column, scale, in_depth, in_width, CAUSAL, MASK, True, PRECISION, BLOCK_N,
        )  # fmt: skip

    y = acc * inverse(total)[:, None]
    results = entry + 1 + CLUSTERS + VALUES
    if CLUSTERS == 1:
        head = tl.load(results + wide // BLOCK_V).to(tl.int64)[None, :]
    else:
        ours = tl.where(cluster < 0, 0, slot)[:, None]
        head = tl.load(results + ours * VALUES + (wide // BLOCK_V)[None, :]).to(tl.int64)
    first = ((split * tl.num_programs(2) + batch) * heads) * queries * VALUE_WIDTH
    column = head * queries * VALUE_WIDTH + dim[None, :]
    if HINT and CLUSTERS == 1:
        column = tl.max_contiguous(tl.multiple_of(column, (1, 16)), (1, BLOCK_V))
    inside = (cluster >= 0)[:, None] & (head >= 0) & in_width
    target = out + first + (position * VALUE_WIDTH)[:, None] + column
    tl.store(target, y.to(out.dtype.element_ty), mask=inside)
    if SPLITS > 1:
        each = tl.arange(0, VALUES)[None, :]
        ours = tl.where(cluster < 0, 0, slot)[:, None]
        head = tl.load(results + ours * VALUES + each).to(tl.int64)
        inside = (cluster >= 0)[:, None] & (head >= 0)
        at = ((split * tl.num_programs(2) + batch) * heads + head) * queries + position[:, None]
        all_rows = SPLITS * tl.num_programs(2).to(tl.int64) * heads * queries
        tl.store(sums + at, tl.broadcast_to(top[:, None], at.shape), mask=inside)
        tl.store(sums + all_rows + at, tl.broadcast_to(total[:, None], at.shape), mask=inside)


@functools.lru_cache(maxsize=256)
def _on_device(clusters, keys, values, packed, most, device):
    """The tables of `groups.tables` as tensors: made once, as every step of decoding needs them."""
    found = tables(clusters, keys, values, packed, most)
    return tuple(
        (sizes, len(rows), torch.tensor(rows, dtype=torch.int32, device=device))
        for sizes, rows in found.items()
    )


def launch(options, q, k, v, clusters, keys, values, mask, causal, offset, scale):
    """Runs the kernels. Tensors whose last axis is not dense are copied first."""
    blocks = dict(options)
    splits, most, packed = (blocks.pop(name) for name in ("SPLITS", "VALUES", "PACKED"))
    q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))
    batch, count, queries, width = q.shape
    heads, value_width, length = len(clusters), v.shape[-1], k.shape[-2]
    out = torch.empty((batch, heads, queries, value_width), dtype=q.dtype, device=q.device)
    if out.numel() == 0:
        return out
    parts, sums = out, None
    if splits > 1:
        parts = torch.empty((splits, *out.shape), dtype=torch.float32, device=q.device)
        sums = torch.empty((2, *parts.shape[:-1]), dtype=torch.float32, device=q.device)
    if mask is not None:
        mask = mask.expand(batch, count, queries, length)
    kind = 0 if mask is None else 1 if mask.dtype == torch.bool else 2
    keys = keys or [index * k.shape[1] // count for index in range(count)]
    values = values or [index * v.shape[1] // heads for index in range(heads)]
    maps = _on_device(tuple(clusters), tuple(keys), tuple(values), bool(packed), most, q.device)
    for (members, slots), groups, table in maps:
        grid = (triton.cdiv(members * queries, options["BLOCK_M"]), groups * splits, batch)
        attend_kernel[grid](
            q, k, v, mask.view(torch.uint8) if kind == 1 else mask, parts, sums, table, queries,
            length, heads, offset, (width**-0.5 if scale is None else scale) * LOG2E,
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
            *(mask.stride() if kind else (0, 0, 0, 0)),
            CLUSTERS=members, VALUES=slots, WIDTH=width, VALUE_WIDTH=value_width, CAUSAL=causal,
            MASK=kind, PRECISION="ieee" if q.dtype == torch.float32 else None,
            HINT=value_width % ALIGNED == 0 and v.stride(1) % ALIGNED == 0, SPLITS=splits,
            BLOCK_D=max(16, triton.next_power_of_2(width)),
            BLOCK_V=max(16, triton.next_power_of_2(value_width)), **blocks,
        )  # fmt: skip
    if splits > 1:
        merge_kernel[(batch * heads * queries,)](
            parts, sums, out, batch * heads * queries, SPLITS=splits, WIDTH=value_width,
            BLOCK_S=triton.next_power_of_2(splits), BLOCK_W=triton.next_power_of_2(value_width),
            num_warps=4,
        )  # fmt: skip
    return out
