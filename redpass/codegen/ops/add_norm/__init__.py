"""`redpass::add_norm`: a residual add and the norm after it, one pass over memory.

Bound by memory: it reads two tensors and writes two, where separate ops read four and write two
and more. Fused norms reach 2.6 to 2.8 TB/s on an H100 (Hsu et al. 2024, Liger Kernel,
arXiv:2410.10989, and the figures in its repository).
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from typing import Any

import torch
from torch import Tensor

from redpass.codegen.ops.add_norm.reference import add_norm
from redpass.codegen.ops.op import Arguments, Config, Op, random_like

WIDEST = 16384
"""Columns that one program holds in registers without spilling, at 16 warps."""

TILE = 8192
"""Bytes of one program, about: narrow rows are taken several at a time."""


def _fake(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    norm: str,
) -> tuple[Tensor, Tensor]:
    shape = torch.broadcast_shapes(x.shape, residual.shape)
    return x.new_empty(shape), x.new_empty(shape)


def _launch(options: dict[str, int], *arguments: Any) -> tuple[Tensor, Tensor]:
    from redpass.codegen.ops.add_norm import kernel

    found: tuple[Tensor, Tensor] = kernel.launch(options, *arguments)
    return found


def _refuses(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    norm: str,
) -> str:
    if residual.shape != x.shape or residual.dtype != x.dtype:
        return "the two summands differ in shape or dtype"
    if x.shape[-1] > WIDEST:
        return f"rows of {x.shape[-1]}, the kernel holds {WIDEST}"
    return "" if norm in ("rms", "layer") else f"an unknown norm '{norm}'"


def _kind(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    norm: str,
) -> Hashable:
    return x.dtype, x.shape[-1], _dtype(weight), _dtype(bias), norm


def _dtype(tensor: Tensor | None) -> torch.dtype | None:
    return None if tensor is None else tensor.dtype


def _probe(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    norm: str,
) -> Arguments:
    width = x.shape[-1]
    gain, shift = (None if t is None else random_like(t, width) for t in (weight, bias))
    return random_like(x, 5, width), random_like(x, 5, width, scale=3.0), gain, shift, eps, norm


def _configs(x: Tensor, *others: Any) -> tuple[Config, ...]:
    block = max(16, 1 << (x.shape[-1] - 1).bit_length())
    fit = TILE // (block * x.element_size())
    first = max(1, fit) if x.numel() > 2**20 else 1
    tries = [_config(block, rows) for rows in (first, 1, 2, 4, 8) if rows <= 2 * fit]
    return tuple(dict.fromkeys(tries)) or (_config(block, 1),)


def _config(block: int, rows: int) -> Config:
    warps = min(32, max(4, block * rows // 1024))
    return Config.of(warps=warps, BLOCK=block, ROWS=rows)


def _samples(dtype: torch.dtype) -> Iterator[tuple[str, Arguments]]:
    for norm, width, bias in (("rms", 4096, False), ("layer", 781, True), ("rms", WIDEST, False)):
        x, weight = (torch.empty(s, dtype=dtype, device="meta") for s in ((4, 2048, width), width))
        yield f"{norm} {width}", (x, x, weight, weight if bias else None, 1e-5, norm)


OP = Op(
    name="add_norm",
    schema="(Tensor x, Tensor residual, Tensor? weight, Tensor? bias, float eps, str norm)"
    " -> (Tensor, Tensor)",
    reference=add_norm,
    fake=_fake,
    launch=_launch,
    refuses=_refuses,
    kind=_kind,
    probe=_probe,
    configs=_configs,
    samples=_samples,
)
