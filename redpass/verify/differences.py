"""How far two tensors are apart: in bits, in which elements are finite, and in size."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

SMALL_ROW = 2.0**-10
"""Rows smaller than this share of the usual row are measured against the share: a row that
cancels to nothing has no relative error worth the name."""


def shape_fault(old: Tensor, new: Tensor) -> str:
    """Says how the dtype or shape of `new` differs, or returns "" when they are the same."""
    if (old.dtype, old.shape) == (new.dtype, new.shape):
        return ""
    return f"is {new.dtype} {list(new.shape)}, was {old.dtype} {list(old.shape)}"


def differing_bits(old: Tensor, new: Tensor) -> int:
    """Counts elements whose bits differ: 0.0 and -0.0 do, two NaN do not."""
    same = old == new
    if old.is_floating_point():
        same = (same & (torch.signbit(old) == torch.signbit(new))) | (old.isnan() & new.isnan())
    return int((~same).sum())


def lost_finite(old: Tensor, new: Tensor) -> int:
    """Counts elements that were finite and became NaN or infinite."""
    return int((torch.isfinite(old) & ~torch.isfinite(new)).sum()) if old.is_floating_point() else 0


def misplaced_nonfinite(truth: Tensor, old: Tensor, new: Tensor) -> int:
    """Counts elements of `new` that are NaN or infinite and should not be, or the other way round.

    Where the narrow dtype overflows and float64 does not, `before` sets the pattern.
    """
    wanted, found = _pattern(truth), _pattern(new)
    excused = (wanted == 0) & ((_pattern(old) == found) | (found == 0))
    return int(((wanted != found) & ~excused).sum())


def _pattern(value: Tensor) -> Tensor:
    """0 for finite, 1 for NaN, 2 and 3 for the infinities."""
    pattern = value.isnan().to(torch.int8)
    return pattern + 2 * value.isposinf().to(torch.int8) + 3 * value.isneginf().to(torch.int8)


def relative_errors(truth: Tensor, old: Tensor, new: Tensor) -> Iterator[tuple[str, float, float]]:
    """Yields (measure, error of `new`, error of `old`) over the elements finite in all three.

    `error` is ||x - truth|| / ||truth||; `row error` the largest of that over rows, all but the
    last axis.
    """
    if truth.numel() == 0:
        return
    finite = truth.isfinite() & old.isfinite() & new.isfinite()
    ref, was, now = (torch.where(finite, x.to(truth.dtype), 0.0) for x in (truth, old, new))
    scale = ref.norm().item()
    yield (
        "error",
        _ratio((now - ref).norm().item(), scale),
        _ratio((was - ref).norm().item(), scale),
    )
    rows = torch.atleast_1d(ref).norm(dim=-1)
    usual = rows.square().mean().sqrt().item()
    rows = rows.clamp_min(max(usual * SMALL_ROW, torch.finfo(torch.float64).tiny))
    worst = [(torch.atleast_1d(x - ref).norm(dim=-1) / rows).max().item() for x in (now, was)]
    yield "row error", worst[0], worst[1]


def _ratio(error: float, scale: float) -> float:
    if error == 0:
        return 0.0
    return error / scale if scale else float("inf")
