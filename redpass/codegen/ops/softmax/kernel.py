"""Softmax over keys that come in tiles, and over parts of the keys that were done apart.

Scores are in units of log2(e), so that the weights are powers of two.
"""

import triton
import triton.language as tl


@triton.jit
def masked(scores, mask, inside, KIND: tl.constexpr):
    """Applies a tile of a mask, at addresses `mask`: `KIND` 1 is boolean bytes, 2 is added."""
    found = tl.load(mask, mask=inside, other=0)
    if KIND == 1:
        scores = tl.where(found != 0, scores, float("-inf"))
    else:
        # The least float stands for "hidden, unless all are": times log2(e) it would overflow.
        found = found.to(tl.float32)
        low = tl.where(found == float("-inf"), found, -1e30)
        scores += tl.where(found < -1e30, low, found * 1.4426950408889634)
    return scores


@triton.jit
def softened(scores, top):
    """Returns weights of a tile of scores, the largest score so far, and how earlier ones shrink.

    A row that has seen no key has -inf as its largest, and -inf minus -inf is no number.
    """
    higher = tl.maximum(top, tl.max(scores, axis=1))
    base = tl.where(higher == float("-inf"), 0.0, higher)
    return tl.exp2(scores - base[:, None]), higher, tl.exp2(top - base)


@triton.jit
def inverse(total):
    """One over a sum of weights; 0 where no key was seen. A NaN stays one."""
    return tl.where(total == 0.0, 0.0, 1.0 / total)


@triton.jit
def merge_kernel(
    parts,
    sums,
    out,
    rows,
    SPLITS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """One program: one row of `out` [rows, WIDTH] from `parts` [SPLITS, rows, WIDTH].

    `sums` [2, SPLITS, rows] has the largest score of each part's row and the sum of its weights.
    Not the logarithm of that sum: where a mask hides all keys with the least float, it would be
    lost beside the score.
    """
    row = tl.program_id(0).to(tl.int64)
    split, column = tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_W)
    tops = tl.load(sums + split * rows + row, mask=split < SPLITS, other=float("-inf"))
    totals = tl.load(sums + (SPLITS + split) * rows + row, mask=split < SPLITS, other=0.0)
    top = tl.max(tops, axis=0)
    weights = totals * tl.exp2(tops - tl.where(top == float("-inf"), 0.0, top))
    weights = weights * inverse(tl.sum(weights, axis=0))
    inside = (split < SPLITS)[:, None] & (column < WIDTH)[None, :]
    place = (split * rows + row)[:, None] * WIDTH + column[None, :]
    tiles = tl.load(parts + place, mask=inside, other=0.0)
    y = tl.sum(tiles * weights[:, None], axis=0)
    tl.store(out + row * WIDTH + column, y.to(out.dtype.element_ty), mask=column < WIDTH)
