"""`redpass::gated_feed_forward`: gate, up, activation and product of a feed-forward layer in one.

The down projection stays a library GEMM. Widths need not be multiples of the tile, as after
channels were pruned. What is saved is one write and two reads of both activations: a few percent
of a long prefill (Liger Kernel's whole SwiGLU layer: 18.00 against 18.16 ms on an A100), launches
in decoding.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from typing import Any

import torch
from torch import Tensor

from redpass.codegen.ops.activation import ACTIVATIONS
from redpass.codegen.ops.gated_feed_forward.reference import gated_feed_forward
from redpass.codegen.ops.op import Arguments, Config, Op, random_like

FEW_ROWS = 16
"""Up to so many rows, as in decoding, the time is that of reading the weights."""


def _fake(
    x: Tensor,
    gate: Tensor,
    up: Tensor,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    activation: str,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], gate.shape[0]))


def _launch(options: dict[str, int], *arguments: Any) -> Tensor:
    from redpass.codegen.ops.gated_feed_forward import kernel

    found: Tensor = kernel.launch(options, *arguments)
    return found


def _refuses(
    x: Tensor,
    gate: Tensor,
    up: Tensor,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    activation: str,
) -> str:
    if gate.shape != up.shape or gate.dtype != x.dtype or up.dtype != x.dtype:
        return "the two weights differ in shape, or in dtype from the input"
    return "" if activation in ACTIVATIONS else f"an unknown activation '{activation}'"


def _kind(
    x: Tensor,
    gate: Tensor,
    up: Tensor,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    activation: str,
) -> Hashable:
    biases = tuple(None if bias is None else bias.dtype for bias in (gate_bias, up_bias))
    return x.dtype, gate.shape, biases, activation, _has_few_rows(x)


def _probe(
    x: Tensor,
    gate: Tensor,
    up: Tensor,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    activation: str,
) -> Arguments:
    depth, width = gate.shape[1], min(gate.shape[0], 300)
    rows = 3 if _has_few_rows(x) else 70
    weights = [random_like(w, width, depth, scale=depth**-0.5) for w in (gate, up)]
    biases = [None if b is None else random_like(b, width) for b in (gate_bias, up_bias)]
    return random_like(x, rows, depth), *weights, *biases, activation


def _has_few_rows(x: Tensor) -> bool:
    return x.numel() <= FEW_ROWS * x.shape[-1]


def _configs(x: Tensor, *others: Any) -> tuple[Config, ...]:
    sizes = _sizes(x.dtype == torch.float32, _has_few_rows(x), x.shape[-1] % 8 != 0)
    return tuple(_config(*size) for size in sizes)


def _sizes(wide: bool, few: bool, ragged: bool) -> tuple[tuple[int, ...], ...]:
    if wide:  # full float32 products run outside the tensor cores: small tiles
        return ((16, 32, 32, 4, 2),) if few else ((64, 32, 16, 4, 2), (64, 64, 16, 8, 2))
    if ragged:  # rows do not start at multiples of 16 bytes: element by element, in registers
        return ((16, 32, 64, 4, 2),) if few else ((64, 64, 32, 4, 2), (64, 64, 32, 8, 2))
    if few:
        return (16, 32, 128, 4, 3), (16, 64, 64, 4, 4), (16, 32, 64, 4, 4)
    return (128, 64, 64, 8, 3), (128, 128, 64, 8, 3), (128, 64, 64, 4, 3), (64, 64, 64, 4, 3)


def _config(m: int, n: int, k: int, warps: int, stages: int) -> Config:
    return Config.of(warps=warps, stages=stages, BLOCK_M=m, BLOCK_N=n, BLOCK_K=k, GROUP=8)


def _samples(dtype: torch.dtype) -> Iterator[tuple[str, Arguments]]:
    for rows, width, depth in (
        (2048, 14336, 4096),
        (781, 10613, 4000),
        (63, 781, 1001),
        (1, 10613, 4096),
    ):
        x, weight = (torch.empty(n, depth, dtype=dtype, device="meta") for n in (rows, width))
        yield f"{rows} x {depth} to {width}", (x, weight, weight, None, None, "silu")


OP = Op(
    name="gated_feed_forward",
    schema="(Tensor x, Tensor gate, Tensor up, Tensor? gate_bias, Tensor? up_bias, str activation)"
    " -> Tensor",
    reference=gated_feed_forward,
    fake=_fake,
    launch=_launch,
    refuses=_refuses,
    kind=_kind,
    probe=_probe,
    configs=_configs,
    samples=_samples,
)
