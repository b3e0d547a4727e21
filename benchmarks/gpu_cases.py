"""What `gpu.py` times: the shapes of a Llama of 8B, what each call must read, write and compute.

Bytes and operations count what the rewritten op cannot do without: each operand read once, each
result written once, two operations a multiply-add. They give the floor of a card; see `floor`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, rms_norm, scaled_dot_product_attention, silu

from redpass.codegen.ops import OPS
from redpass.codegen.ops.op import Arguments, Op

WIDTH, INNER, HEADS, KEY_HEADS, HEAD = 4096, 14336, 32, 8, 128
RANK = 1024
"""Rank of the factored 4096 x 4096 linear: half its weights."""

GROUPS, KEY_RANK, VALUE_RANK = 8, 256, 256
"""A latent cache at half the bytes: 4 heads of 128 share 256 numbers."""

PREFILL = (2048, 8192)
PAST = (4096, 32768)
BATCHES = (1, 16)


@dataclass(frozen=True)
class Case:
    """One op at one shape.

    Attributes:
        op: the `redpass::` op.
        label: the shape in words.
        arguments: of the op; random, of the right sizes.
        rival: what the rewrite took the place of, in PyTorch's best path, ready to be called.
        rival_name: what that is.
        bytes: read and written at least.
        operations: floating-point operations at least.
    """

    op: Op
    label: str
    arguments: Arguments
    rival: Callable[[], Any]
    rival_name: str
    bytes: int
    operations: int


@dataclass(frozen=True)
class Rates:
    """What a card was measured to do: bytes a second copied, operations a second in a GEMM."""

    bandwidth: float
    operations: float


def floor(case: Case, rates: Rates) -> float:
    """Returns the least microseconds a case can take on a card of these rates."""
    return 1e6 * max(case.bytes / rates.bandwidth, case.operations / rates.operations)


@dataclass(frozen=True)
class Maker:
    """Makes the tensors of cases.

    Attributes:
        shrink: divides every length and width; 1 for what is measured, more for tests.
    """

    dtype: torch.dtype = torch.bfloat16
    device: str = "cuda"
    shrink: int = 1

    def size(self, number: int) -> int:
        """Returns a size, shrunk."""
        return max(1, number // self.shrink)

    def normal(self, *shape: int) -> Tensor:
        """Returns random numbers: a GEMM on zeros is faster than one on data."""
        return torch.randn(shape, device=self.device, dtype=self.dtype)

    def bytes_of(self, *tensors: Tensor | None) -> int:
        """Returns the bytes of tensors."""
        return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def cases(make: Maker) -> Iterator[Case]:
    """Yields all cases, one after the other, so that one's tensors can be freed for the next."""
    for rows in (*PREFILL, *BATCHES):
        yield add_norm(make, make.size(rows) if rows in PREFILL else rows)
        yield gated_feed_forward(make, make.size(rows) if rows in PREFILL else rows)
    for length, batch in ((PREFILL[0], 1), (PREFILL[1], 1), (1, 1), (1, 16)):
        yield rotary(make, batch, make.size(length))
    for rows in BATCHES:
        yield low_rank_linear(make, rows)
    for m in (2, 4):
        for length in PREFILL:
            yield clustered_prefill(make, m, make.size(length))
        for batch in BATCHES:
            for past in PAST:
                yield clustered_decode(make, m, batch, make.size(past))
    for batch in BATCHES:
        for past in PAST:
            yield latent(make, batch, make.size(past))


def add_norm(make: Maker, rows: int) -> Case:
    """Residual add and RMS norm of `rows` rows."""
    width = make.size(WIDTH)
    x, residual, gain = make.normal(rows, width), make.normal(rows, width), make.normal(width)

    def rival() -> Tensor:
        return rms_norm(x + residual, (width,), gain, 1e-5)

    return Case(
        op=OPS["add_norm"],
        label=f"{rows} rows of {width}",
        arguments=(x, residual, gain, None, 1e-5, "rms"),
        rival=rival,
        rival_name="add, rms_norm",
        bytes=2 * make.bytes_of(x, residual) + make.bytes_of(gain),
        operations=6 * x.numel(),
    )


def gated_feed_forward(make: Maker, rows: int) -> Case:
    """Gate, up, SiLU and product of `rows` rows."""
    width, inner = make.size(WIDTH), make.size(INNER)
    x, gate, up = make.normal(rows, width), make.normal(inner, width), make.normal(inner, width)

    def rival() -> Tensor:
        return silu(linear(x, gate)) * linear(x, up)

    return Case(
        op=OPS["gated_feed_forward"],
        label=f"{rows} rows, {width} to {inner}",
        arguments=(x, gate, up, None, None, "silu"),
        rival=rival,
        rival_name="two GEMMs, silu, mul",
        bytes=make.bytes_of(x, gate, up) + rows * inner * x.element_size(),
        operations=4 * rows * width * inner,
    )


def rotary(make: Maker, batch: int, length: int) -> Case:
    """Rotation of queries and keys, as projections leave them in memory."""
    q, k = (make.normal(batch, length, h, HEAD).transpose(1, 2) for h in (HEADS, KEY_HEADS))
    cos, sin = make.normal(1, length, HEAD), make.normal(1, length, HEAD)

    def turned(x: Tensor) -> Tensor:
        crossed = torch.cat((-x[..., HEAD // 2 :], x[..., : HEAD // 2]), -1)
        return x * cos.unsqueeze(1) + crossed * sin.unsqueeze(1)

    return Case(
        op=OPS["rotary"],
        label=f"batch {batch}, {length} positions, {HEADS}/{KEY_HEADS} heads of {HEAD}",
        arguments=(q, k, cos, sin, False),
        rival=lambda: (turned(q), turned(k)),
        rival_name="slices, neg, cat, mul, add",
        bytes=2 * make.bytes_of(q, k) + make.bytes_of(cos, sin),
        operations=3 * (q.numel() + k.numel()),
    )


def low_rank_linear(make: Maker, rows: int) -> Case:
    """A factored linear in decoding, against the dense one it took the place of."""
    width, rank = make.size(WIDTH), make.size(RANK)
    x, dense = make.normal(rows, width), make.normal(width, width)
    down, up = make.normal(rank, width), make.normal(width, rank)
    return Case(
        op=OPS["low_rank_linear"],
        label=f"{rows} rows, {width} by {rank} to {width}",
        arguments=(x, down, up, None, "none"),
        rival=lambda: linear(x, dense),
        rival_name="the dense GEMM",
        bytes=make.bytes_of(x, down, up) + rows * width * x.element_size(),
        operations=4 * rows * width * rank,
    )


def clustered_prefill(make: Maker, m: int, length: int) -> Case:
    """Causal attention of 32 heads in clusters of `m`, against flash attention on all heads."""
    count = HEADS // m
    q, k = (make.normal(1, count, length, HEAD) for _ in range(2))
    v, full = make.normal(1, HEADS, length, HEAD), make.normal(1, HEADS, length, HEAD)
    seen = length * (length + 1) // 2
    return Case(
        op=OPS["clustered_attention"],
        label=f"prefill {length}, {count} clusters of {m}",
        arguments=(q, k, v, clusters(m), [], [], None, True, 0, None),
        rival=lambda: scaled_dot_product_attention(full, full, v, is_causal=True),
        rival_name="SDPA on all heads",
        bytes=make.bytes_of(q, k, v, v),
        operations=2 * HEAD * seen * (count + HEADS),
    )


def clustered_decode(make: Maker, m: int, batch: int, past: int) -> Case:
    """One token of attention with a key cache of a `m`-th of the heads."""
    count = HEADS // m
    q, k = make.normal(batch, count, 1, HEAD), make.normal(batch, count, past, HEAD)
    v, full = make.normal(batch, HEADS, past, HEAD), make.normal(batch, HEADS, past, HEAD)
    queries = make.normal(batch, HEADS, 1, HEAD)
    return Case(
        op=OPS["clustered_attention"],
        label=f"decode, batch {batch}, {past} past, {count} clusters of {m}",
        arguments=(q, k, v, clusters(m), [], [], None, False, 0, None),
        rival=lambda: scaled_dot_product_attention(queries, full, v),
        rival_name="SDPA on all heads",
        bytes=make.bytes_of(q, k, v, queries),
        operations=2 * HEAD * batch * past * (count + HEADS),
    )


def clusters(m: int) -> list[int]:
    """Returns the cluster of each head, `m` heads each in order."""
    return [head // m for head in range(HEADS)]


def latent(make: Maker, batch: int, past: int) -> Case:
    """One token of attention over a latent cache of half the bytes, against the full cache."""
    q = make.normal(batch, HEADS, 1, HEAD)
    keys, values = (make.normal(batch, past, GROUPS, r) for r in (KEY_RANK, VALUE_RANK))
    key_up, value_up = (make.normal(HEADS, HEAD, r) for r in (KEY_RANK, VALUE_RANK))
    cos, sin = (make.normal(1, past, HEAD // 2) for _ in range(2))
    k, v = (make.normal(batch, HEADS, past, HEAD) for _ in range(2))
    rebuilt = HEADS * HEAD * KEY_RANK
    return Case(
        op=OPS["latent_attention"],
        label=f"decode, batch {batch}, {past} past, {GROUPS} latents of {KEY_RANK}",
        arguments=(q, keys, key_up, values, value_up, cos, sin, None, False, HEAD**-0.5),
        rival=lambda: scaled_dot_product_attention(q, k, v),
        rival_name="SDPA on the full cache",
        bytes=make.bytes_of(q, q, keys, values, key_up, value_up, cos, sin),
        operations=2 * batch * past * (rebuilt + HEADS * (HEAD + VALUE_RANK)),
    )


def percent(part: float, whole: float) -> str:
    """Returns a share as a whole percentage, a dash where there is none."""
    return f"{100 * part / whole:.0f}%" if whole and math.isfinite(whole) else "-"
