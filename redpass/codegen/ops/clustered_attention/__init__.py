"""`redpass::clustered_attention`: heads that share scores share their computing.

Heads of a cluster have the same queries and keys (or were given the same, Agarwal et al. 2024,
CHAI, arXiv:2403.08058), so the score matrix is computed once and multiplied with all their value
heads. With m value heads to a cluster the cost of attention, and the bytes of its cache, fall to
(1 + 1/m) / 2 of what they were: below 2 times, and only attention.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from redpass.codegen.ops.clustered_attention.cpu import attend, head_tables, shared_heads
from redpass.codegen.ops.clustered_attention.reference import clustered_attention, spread
from redpass.codegen.ops.op import Arguments, Config, Op, capability_of, random_like, splits_of

FEW_QUERIES = 16
"""Up to so many, the time is that of reading keys and values."""

WIDEST = 256
MOST_GROUPS = 65535
"""Size of CUDA's second and third grid axes."""

Sizes = tuple[tuple[int, ...], ...]

MANY: tuple[tuple[Sizes, Sizes, Sizes], ...] = (
    (
        ((64, 64, 4, 8, 2), (128, 64, 2, 8, 2), (64, 32, 4, 8, 3)),
        ((64, 64, 2, 8, 2), (64, 32, 2, 8, 3), (64, 32, 2, 8, 2)),
        ((64, 32, 1, 8, 2),),
    ),
    (
        ((128, 64, 4, 8, 2), (128, 64, 2, 8, 2), (64, 64, 4, 8, 2), (128, 32, 4, 8, 3)),
        ((128, 64, 2, 8, 2), (64, 32, 4, 8, 2), (128, 32, 2, 8, 3), (64, 64, 2, 8, 2)),
        ((64, 32, 2, 8, 2), (64, 32, 1, 8, 2)),
    ),
)
"""Many queries. Before and from compute capability 9.0 on; heads up to 64, 128, 256 columns:
rows, keys, value heads, warps, stages. Chosen so that nothing spills (`benchmarks/results/`)."""

FEW: tuple[Sizes, Sizes, Sizes] = (
    ((64, 4, 4, 2), (32, 8, 4, 2), (64, 8, 8, 2)),
    ((32, 4, 8, 2), (16, 4, 4, 2), (64, 2, 8, 2), (32, 8, 8, 2)),
    ((32, 2, 8, 2), (16, 2, 4, 2)),
)
"""Few queries: keys, value heads, warps, stages."""

WIDE_MANY: tuple[Sizes, Sizes] = (((32, 16, 1, 8, 1), (16, 16, 2, 8, 1)), ((32, 16, 1, 16, 1),))
WIDE_FEW: tuple[Sizes, Sizes] = (((16, 2, 8, 1),), ((16, 1, 16, 1),))
"""Float32, whose products run outside the tensor cores; heads up to 128 and 256 columns."""

ALL_REGISTERS = 255
"""Of a thread, with up to 8 warps. Told so, the assembler spills nothing for more warps at once."""


def _fake(q: Tensor, k: Tensor, v: Tensor, clusters: Sequence[int], *others: Any) -> Tensor:
    return q.new_empty((q.shape[0], len(clusters), q.shape[2], v.shape[3]))


def _launch(options: dict[str, int], *arguments: Any) -> Tensor:
    from redpass.codegen.ops.clustered_attention import kernel

    found: Tensor = kernel.launch(options, *arguments)
    return found


def _refuses(
    q: Tensor, k: Tensor, v: Tensor, clusters: Sequence[int], keys: Sequence[int],
    values: Sequence[int], mask: Tensor | None, *others: Any,
) -> str:  # fmt: skip
    if k.dtype != q.dtype or v.dtype != q.dtype:
        return "queries, keys and values differ in dtype"
    if max(q.shape[-1], v.shape[-1]) > WIDEST:
        return f"heads of over {WIDEST} columns"
    if max(q.shape[0], 16 * len(clusters)) > MOST_GROUPS:
        return f"a batch of over {MOST_GROUPS}"
    if k.shape[-2] == 0:
        return "no keys"
    if mask is not None and mask.is_floating_point() and mask.dtype == torch.float64:
        return "a float64 mask"
    return ""


def _kind(
    q: Tensor, k: Tensor, v: Tensor, clusters: Sequence[int], keys: Sequence[int],
    values: Sequence[int], mask: Tensor | None, causal: bool, *others: Any,
) -> Hashable:  # fmt: skip
    maps = tuple(clusters), tuple(keys), tuple(values), q.shape[1], k.shape[1], v.shape[1]
    seen = None if mask is None else mask.dtype
    return q.dtype, q.shape[-1], v.shape[-1], maps, seen, causal, _has_few(q)


def _has_few(q: Tensor) -> bool:
    return q.shape[-2] <= FEW_QUERIES


def _probe(
    q: Tensor, k: Tensor, v: Tensor, clusters: Sequence[int], keys: Sequence[int],
    values: Sequence[int], mask: Tensor | None, causal: bool, offset: int, scale: float | None,
) -> Arguments:  # fmt: skip
    queries, length = (2, 70) if _has_few(q) else (37, 70)
    sizes = ((q, queries), (k, length), (v, length))
    operands = [random_like(x, 2, x.shape[1], n, x.shape[-1]) for x, n in sizes]
    if mask is not None:
        seen = random_like(q, 1, 1, queries, length) > 0
        is_boolean = mask.dtype == torch.bool
        mask = seen if is_boolean else torch.where(seen, 0.0, float("-inf")).to(mask.dtype)
    return *operands, clusters, keys, values, mask, causal, length - queries, scale


def _configs(
    q: Tensor, k: Tensor, v: Tensor, clusters: Sequence[int], *others: Any
) -> tuple[Config, ...]:
    width, wide = max(q.shape[-1], v.shape[-1]), q.dtype == torch.float32
    place = 0 if width <= 64 else 1 if width <= 128 else 2
    if _has_few(q):
        table = WIDE_FEW[width > 128] if wide else FEW[place]
        splits = splits_of(q.shape[0] * k.shape[1], k.shape[-2])
        return tuple(_config(16, n, m, w, s, splits, 1, wide=wide) for n, m, w, s in table)
    many = WIDE_MANY[width > 128] if wide else MANY[capability_of(q) >= 90][place]
    return tuple(_config(*sizes, wide=wide) for sizes in many)


def _config(
    m: int, n: int, values: int, warps: int, stages: int, splits: int = 1, packed: int = 0,
    *, wide: bool = False,
) -> Config:  # fmt: skip
    limit = {"maxnreg": ALL_REGISTERS} if wide and warps <= 8 else {}
    return Config.of(
        warps=warps, stages=stages,
        BLOCK_M=m, BLOCK_N=n, VALUES=values, SPLITS=splits, PACKED=packed, **limit,
    )  # fmt: skip


def _samples(dtype: torch.dtype) -> Iterator[tuple[str, Arguments]]:
    for label, width, count, m, queries, length, causal in (
        ("prefill", 128, 16, 2, 2048, 2048, True), ("prefill", 64, 4, 4, 1024, 1024, False),
        ("prefill", 80, 8, 1, 781, 781, True), ("decode", 128, 8, 4, 1, 32768, False),
        ("decode", 64, 4, 3, 5, 781, True),
    ):  # fmt: skip
        sizes = ((count, queries), (count, length), (count * m, length))
        operands = [torch.empty(1, h, n, width, dtype=dtype, device="meta") for h, n in sizes]
        clusters = spread([], count * m, count)
        name = f"{label} {queries} x {length}, {count} clusters of {m}, {width}"
        yield name, (*operands, clusters, [], [], None, causal, length - queries, None)


OP = Op(
    name="clustered_attention",
    schema="(Tensor q, Tensor k, Tensor v, int[] clusters, int[] keys, int[] values, Tensor? mask,"
    " bool causal, SymInt offset, float? scale) -> Tensor",
    reference=clustered_attention,
    fake=_fake,
    launch=_launch,
    refuses=_refuses,
    kind=_kind,
    probe=_probe,
    configs=_configs,
    samples=_samples,
    cpu=shared_heads,
    inline=attend,
    constants=head_tables,
)
