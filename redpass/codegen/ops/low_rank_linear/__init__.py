"""`redpass::low_rank_linear`: a linear layer factored in two, on few rows.

In decoding a layer is bound by reading its weights, and two factors of rank r have r (n + k) of
them in place of n k. The kernel reads each once, keeps the thin middle in the cache and adds bias
and activation at the end. Above 16 rows two library GEMMs are near ideal already (Inductor has
such a fusion, `b2b_gemm`, and leaves it off): the reference runs.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from typing import Any

import torch
from torch import Tensor

from redpass.codegen.ops.activation import ACTIVATIONS
from redpass.codegen.ops.low_rank_linear.reference import low_rank_linear
from redpass.codegen.ops.op import PROGRAMS, Arguments, Config, Op, random_like

MOST_ROWS = 16


def _fake(x: Tensor, down: Tensor, up: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    return x.new_empty((*x.shape[:-1], up.shape[0]))


def _launch(options: dict[str, int], *arguments: Any) -> Tensor:
    from redpass.codegen.ops.low_rank_linear import kernel

    found: Tensor = kernel.launch(options, *arguments)
    return found


def _refuses(x: Tensor, down: Tensor, up: Tensor, bias: Tensor | None, activation: str) -> str:
    if down.dtype != x.dtype or up.dtype != x.dtype:
        return "a weight's dtype is not the input's"
    return "" if activation in ACTIVATIONS else f"an unknown activation '{activation}'"


def _pays(x: Tensor, *others: Any) -> bool:
    return x.numel() <= MOST_ROWS * x.shape[-1]


def _kind(x: Tensor, down: Tensor, up: Tensor, bias: Tensor | None, activation: str) -> Hashable:
    return x.dtype, down.shape, up.shape[0], None if bias is None else bias.dtype, activation


def _probe(x: Tensor, down: Tensor, up: Tensor, bias: Tensor | None, activation: str) -> Arguments:
    rank, depth = down.shape
    width = min(up.shape[0], 300)
    factors = (
        random_like(down, rank, depth, scale=depth**-0.5),
        random_like(up, width, rank, scale=rank**-0.5),
    )
    shift = None if bias is None else random_like(bias, width)
    return random_like(x, 3, depth), *factors, shift, activation


def _configs(x: Tensor, down: Tensor, up: Tensor, *others: Any) -> tuple[Config, ...]:
    if x.dtype == torch.float32:
        sizes: tuple[tuple[int, ...], ...] = ((16, 32, 32, 32, 4, 2),)
    else:
        sizes = ((16, 128, 32, 64, 4, 3), (32, 64, 32, 64, 4, 3), (32, 128, 64, 64, 4, 3),
                 (16, 64, 16, 128, 4, 3))  # fmt: skip
    rows = x.numel() // max(1, x.shape[-1])
    return tuple(_config(rows, down.shape, *size) for size in sizes)


def _config(
    rows: int, shape: torch.Size, r: int, k: int, n: int, j: int, warps: int, stages: int
) -> Config:
    """Cuts the depth so far that the first launch has about `PROGRAMS` programs.

    Each program of the second launch reads the sums of all parts: many rows allow few parts.
    """
    strips, blocks = -(-shape[0] // r), -(-shape[1] // k)
    parts = max(1, min(8, blocks, PROGRAMS // strips, max(2, 32 // max(1, rows))))
    return Config.of(
        warps=warps, stages=stages,
        BLOCK_M=MOST_ROWS, BLOCK_R=r, BLOCK_K=k, BLOCK_N=n, BLOCK_J=j, PARTS=parts,
    )  # fmt: skip


def _samples(dtype: torch.dtype) -> Iterator[tuple[str, Arguments]]:
    for rows, depth, rank, width in ((1, 4096, 1024, 4096), (16, 4095, 333, 10613)):
        sizes = ((rows, depth), (rank, depth), (width, rank), (width,))
        x, down, up, bias = (torch.empty(s, dtype=dtype, device="meta") for s in sizes)
        yield f"{rows} x {depth} by {rank} to {width}", (x, down, up, bias, "silu")


OP = Op(
    name="low_rank_linear",
    schema="(Tensor x, Tensor down, Tensor up, Tensor? bias, str activation) -> Tensor",
    reference=low_rank_linear,
    fake=_fake,
    launch=_launch,
    refuses=_refuses,
    kind=_kind,
    probe=_probe,
    configs=_configs,
    samples=_samples,
    pays=_pays,
)
