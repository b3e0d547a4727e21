"""Residual add and norm in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


def add_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    norm: str,
) -> tuple[Tensor, Tensor]:
    """Returns `x + residual`, and that sum normalised over its last axis.

    Args:
        x: [..., n].
        residual: [..., n].
        weight: [n], what the normalised rows are multiplied by.
        bias: [n], what is added after that.
        eps: added to the variance (or the mean square).
        norm: `rms` (root mean square) or `layer` (mean and variance).
    """
    total = x + residual
    if norm == "layer":
        return total, torch.layer_norm(total, total.shape[-1:], weight, bias, eps)
    normed = torch.rms_norm(total, total.shape[-1:], weight, eps)
    return total, normed if bias is None else normed + bias
