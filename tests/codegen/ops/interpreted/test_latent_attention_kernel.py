from __future__ import annotations

import pytest
import torch

from redpass.codegen.ops import OPS, Config

OP = OPS["latent_attention"]


def config(splits=1):
    return Config.of(BLOCK_N=16, BLOCK_R=16, SPLITS=splits)


def operands(random, heads=4, key_heads=4, groups=2, queries=1, keys=33, width=16, rank=16,
             value_rank=16, dtype=torch.float32, batch=1):  # fmt: skip
    q = random(batch, heads, queries, width, dtype=dtype)
    latents = [random(batch, keys, groups, r, dtype=dtype) for r in (rank, value_rank)]
    ups = [(random(key_heads, width, r) * r**-0.5).to(dtype) for r in (rank, value_rank)]
    angles = random(1, keys, width // 2)
    return q, latents[0], ups[0], latents[1], ups[1], angles.cos(), angles.sin()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("splits", [1, 3])
def test_layouts_and_parts(dtype, interleaved, splits, check, random) -> None:
    found = operands(random, dtype=dtype)
    check(OP, *found, None, interleaved, None, config=config(splits), bf16=True)


@pytest.mark.parametrize(("keys", "width", "rank", "value_rank"), [(1, 2, 1, 3), (63, 80, 33, 17)])
@pytest.mark.parametrize("splits", [1, 2])
def test_odd_sizes(keys, width, rank, value_rank, splits, check, random) -> None:
    found = operands(random, keys=keys, width=width, rank=rank, value_rank=value_rank)
    check(OP, *found, None, False, 0.3, config=config(splits))


@pytest.mark.parametrize("ratio", [1, 4, 8])
@pytest.mark.parametrize("key_heads", [2, 4])
def test_grouped_queries(ratio, key_heads, check, random) -> None:
    found = operands(random, heads=ratio * key_heads, key_heads=key_heads, queries=2)
    check(OP, *found, None, False, None, config=config())


def test_several_queries_and_a_batch(check, random) -> None:
    check(OP, *operands(random, queries=3, batch=2), None, True, None, config=config(2))


@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("kind", [torch.bool, torch.float32])
def test_masks(kind, splits, check, random) -> None:
    found = operands(random, queries=3)
    seen = random(1, 1, 3, 33) > 0
    seen[..., 1, :] = False
    mask = seen if kind == torch.bool else torch.where(seen, 0.0, float("-inf"))
    check(OP, *found, mask, False, None, config=config(splits))


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("gain", [False, True])
def test_normalised_keys(gain, interleaved, check, random) -> None:
    """A width that is no power of two: the mean square counts the columns that are there."""
    found = operands(random, keys=21, width=12, groups=2, key_heads=4, heads=8)
    given = random(12) if gain else None
    check(OP, *found, None, interleaved, None, given, 1e-3, config=config(2))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_normalised_keys_of_half_precision(dtype, check, random) -> None:
    found = operands(random, width=80, rank=33, dtype=dtype)
    gain = random(80, dtype=dtype)
    check(OP, *found, None, False, None, gain, 1e-6, config=config(), bf16=True)


def test_absorbed_values(check, random) -> None:
    q, latent, up, values, _, cos, sin = operands(random, value_rank=24)
    found = check(OP, q, latent, up, values, None, cos, sin, None, False, None, config=config(2))
    assert found.shape == (1, 4, 1, 24)


def test_strides(check, random) -> None:
    q, latent, up, values, raised, *_ = operands(random, queries=2)
    q = q.transpose(1, 2).contiguous().transpose(1, 2)
    latent = random(1, 2, 66, 32).transpose(1, 2)[:, ::2, :, :16]
    up, raised = up.mT.contiguous().mT, raised.mT.contiguous().mT
    both = random(1, 33, 16)
    check(OP, q, latent, up, values, raised, both[..., :8], both[..., 8:], None, False, None,
          config=config())  # fmt: skip


@pytest.mark.parametrize(("dtype", "width"), [(torch.float32, 64), (torch.float16, 128)])
def test_own_configs(dtype, width, check, random) -> None:
    found = operands(random, keys=70, width=width, rank=48, value_rank=40, dtype=dtype)
    for form in OP.configs(*found):
        check(OP, *found, None, False, None, config=form)


def test_empty_batch(check, random) -> None:
    assert check(OP, *operands(random, batch=0), None, False, None).shape == (0, 4, 1, 16)


def test_what_is_refused(random) -> None:
    found = operands(random)
    assert "groups" in OP.refuses(*found[:3], found[3][:, :, :1], *found[4:], None, False, None)
    wide = operands(random, queries=40)
    assert "queries" in OP.refuses(*wide, None, False, None)
