"""Rotary position embedding on the CPU: straight into the result, without temporaries."""

from __future__ import annotations

import torch
from torch import Tensor

from redpass.codegen.ops.rotary.reference import rotary

SMALL = 2**15
"""Elements of queries below which calls cost more than memory (`benchmarks/op_overhead.py`)."""


def rotary_in_place(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool
) -> tuple[Tensor, Tensor]:
    """Returns what `rotary` does; each element is written twice, where the chain writes four."""
    if q.numel() < SMALL or not q.dtype == k.dtype == cos.dtype == sin.dtype:
        return rotary(q, k, cos, sin, interleaved)
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return _rotated(q, cos, sin, interleaved), _rotated(k, cos, sin, interleaved)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    width = cos.shape[-1]
    if width < x.shape[-1]:
        out[..., width:] = x[..., width:]
        x, turned = x[..., :width], out[..., :width]
    else:
        turned = out
    torch.mul(x, cos, out=turned)
    one, two = (slice(0, None, 2), slice(1, None, 2))
    if not interleaved:
        one, two = slice(0, width // 2), slice(width // 2, None)
    turned[..., one].addcmul_(x[..., two], sin[..., one], value=-1)
    turned[..., two].addcmul_(x[..., one], sin[..., two])
    return out
