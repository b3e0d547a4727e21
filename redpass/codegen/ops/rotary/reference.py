"""Rotary position embedding of queries and keys in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


def rotary(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool
) -> tuple[Tensor, Tensor]:
    """Rotates the first `r` columns of queries and keys (Su et al. 2021, arXiv:2104.09864).

    Args:
        q: [b, h, s, d].
        k: [b, g, s, d].
        cos: [b or 1, s, r], r even and at most d: a column for each rotated column.
        sin: as `cos`.
        interleaved: pairs are columns 2i and 2i+1; otherwise i and i + r/2.
    """
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return _rotated(q, cos, sin, interleaved), _rotated(k, cos, sin, interleaved)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    width = cos.shape[-1]
    part = x[..., :width]
    turned = part * cos + _turned(part, interleaved) * sin
    whole = turned if width == x.shape[-1] else torch.cat((turned, x[..., width:]), -1)
    return whole.to(x.dtype).contiguous()


def _turned(x: Tensor, interleaved: bool) -> Tensor:
    if interleaved:
        return torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), -1)
