"""`redpass::latent_attention`: decoding from a cache of low-rank keys and values.

The cache holds latents (Chang et al. 2024, Palu, arXiv:2407.21118), so less is read; keys are
rebuilt on the way, as rotary embedding stands between their up projection and the queries and
forbids absorbing it. Rebuilding costs head size times heads of a group operations for each byte
read: with four heads of 128 to a group, about as much as tensor cores have to give.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from typing import Any

import torch
from torch import Tensor

from redpass.codegen.ops.latent_attention.reference import latent_attention
from redpass.codegen.ops.op import Arguments, Config, Op, capability_of, random_like, splits_of

MOST_ROWS = 64
"""Queries times heads of a group: rows of the one tile that holds their scores."""

WIDEST_VALUE = 512
WIDEST_HEAD = 256
MOST_GROUPS = 65535
"""Size of CUDA's second and third grid axes."""

Sizes = tuple[tuple[int, int, int, int], ...]

SIZES: tuple[Sizes, Sizes] = (
    ((32, 32, 8, 2), (32, 64, 8, 2), (64, 32, 8, 2)),
    ((64, 64, 8, 2), (64, 32, 8, 3), (32, 64, 8, 3)),
)
"""Before and from compute capability 9.0 on: keys, ranks, warps, stages. The first spills
nowhere (`benchmarks/results/`)."""

WIDE: tuple[Sizes, Sizes] = (((16, 16, 8, 1),), ((16, 16, 4, 1),))
"""Float32, whose products run outside the tensor cores."""


def _fake(
    q: Tensor, key_latent: Tensor, key_up: Tensor, value_latent: Tensor, value_up: Tensor | None,
    *others: Any,
) -> Tensor:  # fmt: skip
    width = value_latent.shape[-1] if value_up is None else value_up.shape[1]
    return q.new_empty((*q.shape[:-1], width))


def _launch(options: dict[str, int], *arguments: Any) -> Tensor:
    from redpass.codegen.ops.latent_attention import kernel

    found: Tensor = kernel.launch(options, *arguments)
    return found


def _refuses(
    q: Tensor, key_latent: Tensor, key_up: Tensor, value_latent: Tensor, value_up: Tensor | None,
    *others: Any,
) -> str:  # fmt: skip
    weights = (key_latent, key_up, value_latent, value_up)
    if any(t is not None and t.dtype != q.dtype for t in weights):
        return "queries, latents and weights differ in dtype"
    groups = key_latent.shape[2]
    if value_latent.shape[2] != groups:
        return "keys and values have different groups"
    if q.shape[1] // groups * q.shape[2] > MOST_ROWS:
        return f"over {MOST_ROWS} queries times heads of a group"
    if value_latent.shape[-1] > WIDEST_VALUE or q.shape[-1] > WIDEST_HEAD:
        return f"value latents of over {WIDEST_VALUE} or heads of over {WIDEST_HEAD} columns"
    if max(q.shape[0], groups) > MOST_GROUPS:
        return f"a batch of over {MOST_GROUPS}"
    return "no keys" if key_latent.shape[1] == 0 else ""


def _kind(
    q: Tensor, key_latent: Tensor, key_up: Tensor, value_latent: Tensor, value_up: Tensor | None,
    cos: Tensor, sin: Tensor, mask: Tensor | None, interleaved: bool, scale: float | None,
    key_gain: Tensor | None = None, key_eps: float | None = None,
) -> Hashable:  # fmt: skip
    seen = None if mask is None else mask.dtype
    sizes = q.shape[1:], key_latent.shape[2:], key_up.shape[:2], value_latent.shape[-1]
    normed = key_eps is not None, None if key_gain is None else key_gain.dtype
    return q.dtype, sizes, value_up is None, cos.dtype, seen, interleaved, normed


def _probe(
    q: Tensor, key_latent: Tensor, key_up: Tensor, value_latent: Tensor, value_up: Tensor | None,
    cos: Tensor, sin: Tensor, mask: Tensor | None, interleaved: bool, scale: float | None,
    key_gain: Tensor | None = None, key_eps: float | None = None,
) -> Arguments:  # fmt: skip
    length = 70
    latents = [random_like(t, 2, length, *t.shape[2:]) for t in (key_latent, value_latent)]
    ups = [
        None if t is None else random_like(t, *t.shape, scale=t.shape[-1] ** -0.5)
        for t in (key_up, value_up)
    ]
    tables = [random_like(t, 1, length, t.shape[-1], scale=0.7) for t in (cos, sin)]
    if mask is not None:
        seen = random_like(q, 1, 1, q.shape[2], length) > 0
        is_boolean = mask.dtype == torch.bool
        mask = seen if is_boolean else torch.where(seen, 0.0, float("-inf")).to(mask.dtype)
    query = random_like(q, 2, *q.shape[1:])
    gain = None if key_gain is None else random_like(key_gain, *key_gain.shape)
    latent_operands = query, latents[0], ups[0], latents[1], ups[1]
    return *latent_operands, *tables, mask, interleaved, scale, gain, key_eps


def _configs(q: Tensor, key_latent: Tensor, *others: Any) -> tuple[Config, ...]:
    splits = splits_of(q.shape[0] * key_latent.shape[2], key_latent.shape[1])
    table = WIDE if q.dtype == torch.float32 else SIZES
    sizes = table[capability_of(q) >= 90]
    return tuple(
        Config.of(warps=warps, stages=stages, BLOCK_N=n, BLOCK_R=r, SPLITS=splits)
        for n, r, warps, stages in sizes
    )


def _samples(dtype: torch.dtype) -> Iterator[tuple[str, Arguments]]:
    for heads, key_heads, groups, rank, value_rank, width, length, eps in (
        (32, 32, 8, 256, 256, 128, 65536, None), (32, 8, 8, 96, 80, 128, 4096, 1e-6),
        (8, 4, 2, 33, 50, 80, 781, None),
    ):  # fmt: skip
        shapes = (
            (1, heads, 1, width), (1, length, groups, rank), (key_heads, width, rank),
            (1, length, groups, value_rank), (key_heads, width, value_rank), (width,),
        )  # fmt: skip
        *tensors, gain = [torch.empty(shape, dtype=dtype, device="meta") for shape in shapes]
        table = torch.empty(1, length, width // 2, device="meta")
        label = f"{heads} heads of {width}, {groups} latents of {rank} and {value_rank}, {length}"
        if eps is None:
            yield label, (*tensors, table, table, None, False, None, None, None)
        else:
            yield f"{label}, normed", (*tensors, table, table, None, False, None, gain, eps)


OP = Op(
    name="latent_attention",
    schema="(Tensor q, Tensor key_latent, Tensor key_up, Tensor value_latent, Tensor? value_up,"
    " Tensor cos, Tensor sin, Tensor? mask, bool interleaved, float? scale, Tensor? key_gain=None,"
    " float? key_eps=None) -> Tensor",
    reference=latent_attention,
    fake=_fake,
    launch=_launch,
    refuses=_refuses,
    kind=_kind,
    probe=_probe,
    configs=_configs,
    samples=_samples,
)
