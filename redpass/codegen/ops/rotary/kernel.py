"""Rotary position embedding: queries and keys in one launch, tables read once for several heads."""

import torch
import triton
import triton.language as tl


@triton.jit
def _load_pairs(row, inside, ROWS: tl.constexpr, ROTATED: tl.constexpr, INTERLEAVED: tl.constexpr,
                BLOCK: tl.constexpr):  # fmt: skip
    """Returns the first and the second of each pair of columns, float32 [ROWS, BLOCK]."""
    if INTERLEAVED:
        # Neighbours are read together and taken apart in registers: two reads of every second
        # element would take twice the instructions for the same lines.
        column = tl.arange(0, 2 * BLOCK)[None, :]
        both = tl.load(row + column, mask=inside & (column < ROTATED), other=0.0).to(tl.float32)
        first, second = tl.split(tl.reshape(both, (ROWS, BLOCK, 2)))
    else:
        column = tl.arange(0, BLOCK)[None, :]
        mask = inside & (column < ROTATED // 2)
        first = tl.load(row + column, mask=mask, other=0.0).to(tl.float32)
        second = tl.load(row + ROTATED // 2 + column, mask=mask, other=0.0).to(tl.float32)
    return first, second


@triton.jit
def _store_pairs(row, inside, first, second, ROWS: tl.constexpr, ROTATED: tl.constexpr,
                 INTERLEAVED: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    dtype = row.dtype.element_ty
    if INTERLEAVED:
        column = tl.arange(0, 2 * BLOCK)[None, :]
        both = tl.reshape(tl.join(first, second), (ROWS, 2 * BLOCK))
        tl.store(row + column, both.to(dtype), mask=inside & (column < ROTATED))
    else:
        column = tl.arange(0, BLOCK)[None, :]
        mask = inside & (column < ROTATED // 2)
        tl.store(row + column, first.to(dtype), mask=mask)
        tl.store(row + ROTATED // 2 + column, second.to(dtype), mask=mask)


@triton.jit
def rotary_kernel(
    q,
    k,
    cos,
    sin,
    q_out,
    k_out,
    positions,
    q_heads,
    k_heads,
    q_batch,
    q_head,
    q_row,
    k_batch,
    k_head,
    k_row,
    cos_batch,
    cos_row,
    sin_batch,
    sin_row,
    WIDTH: tl.constexpr,
    ROTATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    ROWS: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
    REST: tl.constexpr,
):
    """One program: `ROWS` positions of `HEADS` heads of one sequence."""
    batch = tl.program_id(2).to(tl.int64)
    position = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    inside = position < positions
    cos_rows = cos + batch * cos_batch + position * cos_row
    sin_rows = sin + batch * sin_batch + position * sin_row
    cos1, cos2 = _load_pairs(cos_rows, inside, ROWS, ROTATED, INTERLEAVED, BLOCK)
    sin1, sin2 = _load_pairs(sin_rows, inside, ROWS, ROTATED, INTERLEAVED, BLOCK)
    for i in range(HEADS):
        # Heads are counted through: those of the queries, then those of the keys.
        head = (tl.program_id(1) * HEADS + i).to(tl.int64)
        # A comparison of scalars, `&`ed to a tensor, is no mask to the interpreter.
        real = tl.where(head < q_heads + k_heads, position, positions) < positions
        if head < q_heads:
            source = q + batch * q_batch + head * q_head + position * q_row
            target = q_out + ((batch * q_heads + head) * positions + position) * WIDTH
        else:
            head -= q_heads
            source = k + batch * k_batch + head * k_head + position * k_row
            target = k_out + ((batch * k_heads + head) * positions + position) * WIDTH
        first, second = _load_pairs(source, real, ROWS, ROTATED, INTERLEAVED, BLOCK)
        turned1 = first * cos1 - second * sin1
        turned2 = second * cos2 + first * sin2
        _store_pairs(target, real, turned1, turned2, ROWS, ROTATED, INTERLEAVED, BLOCK)
        if REST > 0:
            column = ROTATED + tl.arange(0, REST)[None, :]
            mask = real & (column < WIDTH)
            tl.store(target + column, tl.load(source + column, mask=mask), mask=mask)


def launch(options, q, k, cos, sin, interleaved):
    """Runs the kernel. Tensors whose last axis is not dense are copied first."""
    q, k, cos, sin = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, cos, sin))
    batch, q_heads, positions, width = q.shape
    q_out, k_out = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k))
    if q_out.numel() == 0:
        return q_out, k_out
    heads, rotated = q_heads + k.shape[1], cos.shape[-1]
    cos, sin = (t.expand(batch, positions, rotated) for t in (cos, sin))
    rest = width - rotated
    grid = (
        triton.cdiv(positions, options["ROWS"]), triton.cdiv(heads, options["HEADS"]), batch,
    )  # fmt: skip
    rotary_kernel[grid](
        q, k, cos, sin, q_out, k_out, positions, q_heads, k.shape[1],
        *q.stride()[:3], *k.stride()[:3], *cos.stride()[:2], *sin.stride()[:2],
        WIDTH=width, ROTATED=rotated, INTERLEAVED=interleaved,
        BLOCK=triton.next_power_of_2(rotated // 2),
        REST=triton.next_power_of_2(rest) if rest else 0, **options,
    )  # fmt: skip
    return q_out, k_out
