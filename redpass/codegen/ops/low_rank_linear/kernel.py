"""A low-rank linear on few rows: two launches that together read each weight once.

Both products are bound by reading weights, so all of the GPU must take part in each; one kernel
for both would have to wait for all programs in its middle. The first is cut along the depth too,
as there are few rows of `down`; its partial sums, float32, stay in the L2 cache (16 rows of rank
512 in 8 parts: 256 KB), and the second adds them up while it loads them.
"""

import torch
import triton
import triton.language as tl

from redpass.codegen.ops.activation.kernel import activate


@triton.jit
def down_kernel(
    x,
    down,
    sums,
    rows,
    x_row,
    down_row,
    down_column,
    RANK: tl.constexpr,
    DEPTH: tl.constexpr,
    PART: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One program: `BLOCK_R` of the middle's columns over `PART` of the depth, for all rows."""
    row, depth = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_K)
    column = (tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)
    begin = tl.program_id(1) * PART
    # The weight is the left operand: it has the many rows that tensor cores want there.
    inner = tl.minimum(column, RANK - 1)[:, None]
    weights = down + inner * down_row + (begin + depth).to(tl.int64)[None, :] * down_column
    inputs = x + row.to(tl.int64)[None, :] * x_row + (begin + depth)[:, None]
    total = tl.zeros((BLOCK_R, BLOCK_M), tl.float32)
    for start in range(0, PART, BLOCK_K):
        inside = begin + start + depth < DEPTH
        tile = tl.load(weights, mask=inside[None, :], other=0.0)
        values = tl.load(inputs, mask=inside[:, None] & (row < rows)[None, :], other=0.0)
        total = tl.dot(tile, values, total, input_precision=PRECISION)
        weights += BLOCK_K * down_column
        inputs += BLOCK_K
    # A part may have no rows of its own; its zeros are written all the same.
    place = (tl.program_id(1) * rows + row)[None, :] * RANK + column[:, None]
    tl.store(sums + place, total, mask=(column < RANK)[:, None] & (row < rows)[None, :])


@triton.jit
def up_kernel(
    sums,
    up,
    bias,
    out,
    rows,
    up_row,
    up_column,
    WIDTH: tl.constexpr,
    RANK: tl.constexpr,
    PARTS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    """One program: `BLOCK_N` columns of the result, for all rows."""
    row, middle = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_J)
    column = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    inner = tl.minimum(column, WIDTH - 1)[:, None]
    total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for start in range(0, RANK, BLOCK_J):
        at = start + middle
        weights = up + inner * up_row + at.to(tl.int64)[None, :] * up_column
        tile = tl.load(weights, mask=(at < RANK)[None, :], other=0.0)
        inside = (at < RANK)[:, None] & (row < rows)[None, :]
        strip = tl.zeros((BLOCK_J, BLOCK_M), tl.float32)
        for part in tl.static_range(PARTS):
            place = (part * rows + row)[None, :] * RANK + at[:, None]
            strip += tl.load(sums + place, mask=inside, other=0.0)
        # Rounded as the middle of two GEMMs is, and as tensor cores take it.
        total = tl.dot(tile, strip.to(up.dtype.element_ty), total, input_precision=PRECISION)
    if bias is not None:
        total += tl.load(bias + column, mask=column < WIDTH, other=0.0).to(tl.float32)[:, None]
    y = activate(total, ACTIVATION)
    # epilogue: y
    place = row.to(tl.int64)[None, :] * WIDTH + column[:, None]
    mask = (column < WIDTH)[:, None] & (row < rows)[None, :]
    tl.store(out + place, y.to(out.dtype.element_ty), mask=mask)


def launch(options, x, down, up, bias, activation):
    """Runs the kernels on up to `BLOCK_M` rows."""
    blocks = dict(options)
    parts, width, (rank, depth) = blocks.pop("PARTS"), up.shape[0], down.shape
    flat = x.reshape(-1, depth)
    flat = flat if flat.stride(1) == 1 else flat.contiguous()
    out = torch.empty((*x.shape[:-1], width), dtype=x.dtype, device=x.device)
    rows = flat.shape[0]
    if rows == 0 or width == 0:
        return out
    assert rows <= options["BLOCK_M"]
    sums = torch.empty((parts, rows, rank), dtype=torch.float32, device=x.device)
    precision = "ieee" if x.dtype == torch.float32 else None
    # Whole blocks, or a part's last block would reach into the next part.
    part = triton.cdiv(depth, parts * options["BLOCK_K"]) * options["BLOCK_K"]
    first = {name: blocks[name] for name in blocks if name not in ("BLOCK_N", "BLOCK_J")}
    second = {name: blocks[name] for name in blocks if name not in ("BLOCK_R", "BLOCK_K")}
    down_kernel[(triton.cdiv(rank, options["BLOCK_R"]), parts)](
        flat, down, sums, rows, flat.stride(0), *down.stride(), RANK=rank, DEPTH=depth,
        PART=part, PRECISION=precision, **first,
    )  # fmt: skip
    up_kernel[(triton.cdiv(width, options["BLOCK_N"]),)](
        sums, up, bias if bias is None else bias.contiguous(), out, rows, *up.stride(), WIDTH=width,
        RANK=rank, PARTS=parts, ACTIVATION=activation, PRECISION=precision, **second,
    )  # fmt: skip
    return out
