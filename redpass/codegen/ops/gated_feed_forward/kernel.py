"""Gated feed-forward: two products that share their left operand, and the gate as their epilogue.

The gate and up activations stay in registers: what separate ops write, read, write and read again
is written once.
"""

import torch
import triton
import triton.language as tl

from redpass.codegen.ops.activation.kernel import activate


@triton.jit
def gated_feed_forward_kernel(
    x,
    gate,
    up,
    gate_bias,
    up_bias,
    out,
    rows,
    x_row,
    gate_row,
    gate_column,
    up_row,
    up_column,
    WIDTH: tl.constexpr,
    DEPTH: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """One program: `BLOCK_M` rows by `BLOCK_N` of the `WIDTH` columns, over `DEPTH` inputs."""
    # Neighbouring programs take GROUP row blocks by a few column blocks, so that weights and
    # rows are found in the L2 cache (a plain order would stream all weights for each row block).
    row_blocks, column_blocks = tl.cdiv(rows, BLOCK_M), tl.cdiv(WIDTH, BLOCK_N)
    first = tl.program_id(0) // (GROUP * column_blocks) * GROUP
    size = min(row_blocks - first, GROUP)
    place = tl.program_id(0) % (GROUP * column_blocks)
    row = ((first + place % size) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    column = (place // size * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)

    depth = tl.arange(0, BLOCK_K)
    in_rows, in_columns = (row < rows)[:, None], (column < WIDTH)[None, :]
    # Rows and columns past the end read the last ones: cheaper than a mask in the loop, and
    # what they give is not stored.
    left = x + tl.minimum(row, rows - 1)[:, None] * x_row + depth[None, :]
    inner = tl.minimum(column, WIDTH - 1)[None, :]
    gates = gate + inner * gate_row + depth[:, None] * gate_column
    ups = up + inner * up_row + depth[:, None] * up_column
    a = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    b = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, DEPTH, BLOCK_K):
        if DEPTH % BLOCK_K == 0:
            tile = tl.load(left)
            gate_tile, up_tile = tl.load(gates), tl.load(ups)
        else:
            rest = DEPTH - start
            tile = tl.load(left, mask=depth[None, :] < rest, other=0.0)
            gate_tile = tl.load(gates, mask=depth[:, None] < rest, other=0.0)
            up_tile = tl.load(ups, mask=depth[:, None] < rest, other=0.0)
        a = tl.dot(tile, gate_tile, a, input_precision=PRECISION)
        b = tl.dot(tile, up_tile, b, input_precision=PRECISION)
        left += BLOCK_K
        gates += BLOCK_K * gate_column
        ups += BLOCK_K * up_column

    if gate_bias is not None:
        a += tl.load(gate_bias + column, mask=column < WIDTH, other=0.0).to(tl.float32)[None, :]
    if up_bias is not None:
        b += tl.load(up_bias + column, mask=column < WIDTH, other=0.0).to(tl.float32)[None, :]
    y = activate(a, ACTIVATION) * b
    # epilogue: y
    place = row[:, None] * WIDTH + column[None, :]
    tl.store(out + place, y.to(out.dtype.element_ty), mask=in_rows & in_columns)


def launch(options, x, gate, up, gate_bias, up_bias, activation):
    """Runs the kernel. Inputs whose rows do not lie at one distance are copied first."""
    width, depth = gate.shape
    flat = x.reshape(-1, depth)
    flat = flat if flat.stride(1) == 1 else flat.contiguous()
    gate_bias, up_bias = (t if t is None else t.contiguous() for t in (gate_bias, up_bias))
    out = torch.empty((*x.shape[:-1], width), dtype=x.dtype, device=x.device)
    rows = flat.shape[0]
    if rows == 0 or width == 0:
        return out
    blocks = triton.cdiv(rows, options["BLOCK_M"]) * triton.cdiv(width, options["BLOCK_N"])
    gated_feed_forward_kernel[(blocks,)](
        flat, gate, up, gate_bias, up_bias, out, rows, flat.stride(0), *gate.stride(), *up.stride(),
        WIDTH=width, DEPTH=depth, ACTIVATION=activation,
        # Float32 means float32: what PyTorch multiplies with unless told otherwise.
        PRECISION="ieee" if x.dtype == torch.float32 else None, **options,
    )  # fmt: skip
    return out
