"""Residual add and norm: each row is read once and stays in registers."""

import torch
import triton
import triton.language as tl


@triton.jit
def add_norm_kernel(
    x,
    residual,
    weight,
    bias,
    total,
    normed,
    rows,
    width,
    x_row,
    residual_row,
    eps,
    LAYER: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: `ROWS` rows of at most `BLOCK` columns."""
    # Rows times width may pass 2^31 elements: row offsets are 64 bits wide.
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    inside = (row < rows) & (column < width)
    added = tl.load(x + row * x_row + column, mask=inside, other=0.0).to(tl.float32)
    added += tl.load(residual + row * residual_row + column, mask=inside, other=0.0).to(tl.float32)
    # The norm sees the sum as it is stored, rounded, so that later layers agree with it.
    rounded = added.to(total.dtype.element_ty)
    tl.store(total + row * width + column, rounded, mask=inside)

    y = rounded.to(tl.float32)
    if LAYER:
        mean = tl.sum(y, axis=1) / width
        y = tl.where(inside, y - mean[:, None], 0.0)
    variance = tl.sum(y * y, axis=1) / width
    y = y * tl.rsqrt(variance + eps)[:, None]
    if weight is not None:
        y = y * tl.load(weight + column, mask=column < width, other=0.0).to(tl.float32)
    if bias is not None:
        y = y + tl.load(bias + column, mask=column < width, other=0.0).to(tl.float32)
    # epilogue: y
    tl.store(normed + row * width + column, y.to(normed.dtype.element_ty), mask=inside)


def launch(options, x, residual, weight, bias, eps, norm):
    """Runs the kernel. A tensor whose rows do not lie at one distance is copied first."""
    width = x.shape[-1]
    flat, other = (_rows(tensor, width) for tensor in (x, residual))
    weight, bias = (t if t is None else t.contiguous() for t in (weight, bias))
    total, normed = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in range(2))
    rows = flat.shape[0]
    if rows == 0 or width == 0:
        return total, normed
    add_norm_kernel[(triton.cdiv(rows, options["ROWS"]),)](
        flat, other, weight, bias, total, normed, rows, width, flat.stride(0), other.stride(0),
        eps, LAYER=norm == "layer", **options,
    )  # fmt: skip
    return total, normed


def _rows(tensor, width):
    flat = tensor.reshape(-1, width)
    return flat if flat.stride(1) == 1 else flat.contiguous()
