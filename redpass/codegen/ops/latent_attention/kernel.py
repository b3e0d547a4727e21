"""Attention over latent keys and values for few queries: keys live in registers only.

A program takes a tile of latents, rebuilds the keys of one head after the other from it,
normalises them where the model does, rotates them, and adds their scores to one tile that has the
queries of all heads of the group as rows. The values stay latents: weights are summed over them,
and the up projection comes last, once for each query. The keys are cut into parts for parallel
programs; their results are merged.
"""

import torch
import triton
import triton.language as tl

from redpass.codegen.ops.softmax.kernel import inverse, masked, merge_kernel, softened

LOG2E = 1.4426950408889634


@triton.jit
def _rotated_keys(latents, ups, up_row, up_column, cos, sin, key_gain, key_eps, in_keys,
                  RANK: tl.constexpr, PAIRS: tl.constexpr, INTERLEAVED: tl.constexpr,
                  NORMED: tl.constexpr, PRECISION: tl.constexpr, BLOCK_N: tl.constexpr,
                  BLOCK_R: tl.constexpr, BLOCK_P: tl.constexpr):  # fmt: skip
    """Returns the first and the second of each pair of columns of one head, [BLOCK_N, BLOCK_P]."""
    rank, pair = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_P)
    one = 2 * pair if INTERLEAVED else pair
    two = 2 * pair + 1 if INTERLEAVED else pair + PAIRS
    first = tl.zeros((BLOCK_N, BLOCK_P), tl.float32)
    second = tl.zeros((BLOCK_N, BLOCK_P), tl.float32)
    for start in range(0, RANK, BLOCK_R):
        at = start + rank
        tile = tl.load(
            latents[:, None] + at[None, :], mask=in_keys & (at < RANK)[None, :], other=0.0
        )
        inside = (at < RANK)[:, None] & (pair < PAIRS)[None, :]
        columns = ups + at[:, None] * up_column
        up_one = tl.load(columns + one[None, :] * up_row, mask=inside, other=0.0)
        up_two = tl.load(columns + two[None, :] * up_row, mask=inside, other=0.0)
        first = tl.dot(tile, up_one, first, input_precision=PRECISION)
        second = tl.dot(tile, up_two, second, input_precision=PRECISION)
    if NORMED:
        # Columns behind the last pair are zero.
        square = tl.sum(first * first, axis=1) + tl.sum(second * second, axis=1)
        root = tl.rsqrt(square / (2 * PAIRS) + key_eps)[:, None]
        first, second = first * root, second * root
        if key_gain is not None:
            first *= tl.load(key_gain + one, mask=pair < PAIRS, other=0.0).to(tl.float32)[None, :]
            second *= tl.load(key_gain + two, mask=pair < PAIRS, other=0.0).to(tl.float32)[None, :]
    # Read once for each head, from the cache: held in registers they would make the loop spill.
    inside = in_keys & (pair < PAIRS)[None, :]
    cosines = tl.load(cos[:, None] + pair[None, :], mask=inside, other=0.0).to(tl.float32)
    sines = tl.load(sin[:, None] + pair[None, :], mask=inside, other=0.0).to(tl.float32)
    return first * cosines - second * sines, second * cosines + first * sines


@triton.jit
def latent_kernel(
    q,
    key_latent,
    key_up,
    value_latent,
    cos,
    sin,
    key_gain,
    mask,
    out,
    sums,
    queries,
    keys,
    heads,
    scale,
    key_eps,
    q_batch,
    q_head,
    q_row,
    key_batch,
    key_row,
    key_group,
    up_head,
    up_row,
    up_column,
    value_batch,
    value_row,
    value_group,
    cos_batch,
    cos_row,
    sin_batch,
    sin_row,
    mask_batch,
    mask_head,
    mask_row,
    mask_column,
    HEADS: tl.constexpr,
    KEY_HEADS: tl.constexpr,
    RANK: tl.constexpr,
    VALUE_RANK: tl.constexpr,
    PAIRS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    NORMED: tl.constexpr,
    MASK: tl.constexpr,
    PRECISION: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """One program: all queries of a group of `HEADS` heads, over one part of the keys.

    With `SPLITS` > 1 it writes partial results as `merge_kernel` takes them.
    """
    split = tl.program_id(0)
    group = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    # Rows are the queries of the group's first head, then those of its second, ...
    row = tl.arange(0, BLOCK_M)
    slot = row // queries
    in_rows = row < HEADS * queries
    head = group * HEADS + slot
    position = (row - slot * queries).to(tl.int64)
    pair = tl.arange(0, BLOCK_P)
    in_pairs = (pair < PAIRS)[None, :]
    one = 2 * pair if INTERLEAVED else pair
    two = 2 * pair + 1 if INTERLEAVED else pair + PAIRS
    query_at = (q + batch * q_batch + head * q_head + position * q_row)[:, None]
    inside = in_rows[:, None] & in_pairs
    query_one = tl.load(query_at + one[None, :], mask=inside, other=0.0)
    query_two = tl.load(query_at + two[None, :], mask=inside, other=0.0)
    # Which of the group's key heads a row reads.
    reads = (slot // (HEADS // KEY_HEADS))[:, None]

    latent_at = key_latent + batch * key_batch + group * key_group
    value_at = value_latent + batch * value_batch + group * value_group
    cos_at, sin_at = cos + batch * cos_batch, sin + batch * sin_batch
    value_column = tl.arange(0, BLOCK_V)[None, :]
    part = tl.cdiv(tl.cdiv(keys, SPLITS), BLOCK_N) * BLOCK_N
    begin = split * part
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_V), tl.float32)
    for start in range(begin, tl.minimum(begin + part, keys), BLOCK_N):
        key = start + tl.arange(0, BLOCK_N)
        at = key.to(tl.int64)
        in_keys = (key < keys)[:, None]
        scores = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for index in range(KEY_HEADS):
            first, second = _rotated_keys(
                latent_at + at * key_row, key_up + (group * KEY_HEADS + index) * up_head,
                up_row, up_column, cos_at + at * cos_row, sin_at + at * sin_row, key_gain, key_eps,
                in_keys, RANK, PAIRS, INTERLEAVED, NORMED, PRECISION, BLOCK_N, BLOCK_R, BLOCK_P,
            )  # fmt: skip
            # Rows of other heads are zero here, so all heads add up in one tile.
            ours = reads == index
            dtype = query_one.dtype
            left = tl.where(ours, query_one.to(tl.float32), 0.0).to(dtype)
            scores = tl.dot(left, tl.trans(first.to(dtype)), scores, input_precision=PRECISION)
            left = tl.where(ours, query_two.to(tl.float32), 0.0).to(dtype)
            scores = tl.dot(left, tl.trans(second.to(dtype)), scores, input_precision=PRECISION)
        scores *= scale
        if MASK != 0:
            mask_at = mask + batch * mask_batch + head * mask_head + position * mask_row
            seen = in_rows[:, None] & (key < keys)[None, :]
            scores = masked(scores, mask_at[:, None] + at[None, :] * mask_column, seen, MASK)
        scores = tl.where((key < keys)[None, :], scores, float("-inf"))
        weights, top, shrink = softened(scores, top)
        values = tl.load(
            value_at + at[:, None] * value_row + value_column,
            mask=in_keys & (value_column < VALUE_RANK), other=0.0,
        )  # fmt: skip
        acc = acc * shrink[:, None]
        acc = tl.dot(weights.to(values.dtype), values, acc, input_precision=PRECISION)
        total = total * shrink + tl.sum(weights, axis=1)

    y = acc * inverse(total)[:, None]
    place = ((split * tl.num_programs(2) + batch) * heads + head) * queries + position
    target = out + place[:, None] * VALUE_RANK + value_column
    inside = in_rows[:, None] & (value_column < VALUE_RANK)
    tl.store(target, y.to(out.dtype.element_ty), mask=inside)
    if SPLITS > 1:
        tl.store(sums + place, top, mask=in_rows)
        all_rows = SPLITS * tl.num_programs(2).to(tl.int64) * heads * queries
        tl.store(sums + all_rows + place, total, mask=in_rows)


def launch(
    options, q, key_latent, key_up, value_latent, value_up, cos, sin, mask, interleaved, scale,
    key_gain=None, key_eps=None,
):  # fmt: skip
    """Runs the kernels. Tensors whose last axis is not dense are copied first."""
    blocks = dict(options)
    splits = blocks["SPLITS"]
    q, key_latent, value_latent, cos, sin = (
        t if t.stride(-1) == 1 else t.contiguous() for t in (q, key_latent, value_latent, cos, sin)
    )
    batch, heads, queries, width = q.shape
    length, groups, rank = key_latent.shape[1:]
    value_rank, pairs = value_latent.shape[-1], width // 2
    latents = torch.empty((batch, heads, queries, value_rank), dtype=q.dtype, device=q.device)
    if latents.numel() == 0:
        return _raised(latents, value_up)
    parts, sums = latents, None
    if splits > 1:
        parts = torch.empty((splits, *latents.shape), dtype=torch.float32, device=q.device)
        sums = torch.empty((2, *parts.shape[:-1]), dtype=torch.float32, device=q.device)
    cos, sin = (t.expand(batch, length, pairs) for t in (cos, sin))
    if mask is not None:
        mask = mask.expand(batch, heads, queries, length)
    key_gain = None if key_gain is None or key_eps is None else key_gain.contiguous()
    kind = 0 if mask is None else 1 if mask.dtype == torch.bool else 2
    latent_kernel[(splits, groups, batch)](
        q, key_latent, key_up, value_latent, cos, sin, key_gain,
        mask.view(torch.uint8) if kind == 1 else mask, parts, sums, queries, length, heads,
        (width**-0.5 if scale is None else scale) * LOG2E, key_eps or 0.0,
        *q.stride()[:3], *key_latent.stride()[:3], *key_up.stride(), *value_latent.stride()[:3],
        *cos.stride()[:2], *sin.stride()[:2], *(mask.stride() if kind else (0, 0, 0, 0)),
        HEADS=heads // groups, KEY_HEADS=key_up.shape[0] // groups, RANK=rank,
        VALUE_RANK=value_rank, PAIRS=pairs, INTERLEAVED=interleaved,
        NORMED=key_eps is not None, MASK=kind,
        PRECISION="ieee" if q.dtype == torch.float32 else None,
        BLOCK_M=max(16, triton.next_power_of_2(heads // groups * queries)),
        BLOCK_P=max(16, triton.next_power_of_2(pairs)),
        BLOCK_V=max(16, triton.next_power_of_2(value_rank)), **blocks,
    )  # fmt: skip
    if splits > 1:
        merge_kernel[(batch * heads * queries,)](
            parts, sums, latents, batch * heads * queries, SPLITS=splits, WIDTH=value_rank,
            BLOCK_S=triton.next_power_of_2(splits), BLOCK_W=triton.next_power_of_2(value_rank),
            num_warps=4,
        )  # fmt: skip
    return _raised(latents, value_up)


def _raised(latents, value_up):
    """The up projection of each value head, on all heads that read it."""
    if value_up is None:
        return latents
    batch, heads, queries, rank = latents.shape
    count, width, _ = value_up.shape
    rows = latents.view(batch, count, heads // count * queries, rank)
    return (rows @ value_up.mT).view(batch, heads, queries, width)
