from __future__ import annotations

import pytest
import torch

from redpass.codegen.ops import OPS, Config

OP = OPS["clustered_attention"]


def config(values=2, splits=1, packed=0, m=16, n=16):
    return Config.of(BLOCK_M=m, BLOCK_N=n, VALUES=values, SPLITS=splits, PACKED=packed)


def operands(random, count, groups, heads, queries, keys, width, wide=None, dtype=torch.float32):
    sizes = ((count, queries, width), (groups, keys, width), (heads, keys, wide or width))
    return [random(1, *size, dtype=dtype) for size in sizes]


FORMS = [config(1), config(4), config(2, 2, packed=1)]
TWO = [config(2), config(4, 2, packed=1)]


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_uniform_clusters(form, causal, dtype, check, random) -> None:
    q, k, v = operands(random, 2, 2, 6, 7, 33, 16, dtype=dtype)
    check(OP, q, k, v, [0, 0, 0, 1, 1, 1], [], [], None, causal, 26, None, config=form,
          bf16=True)  # fmt: skip


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_clusters_of_all_sizes(form, check, random) -> None:
    q, k, v = operands(random, 3, 3, 7, 5, 18, 16)
    check(OP, q, k, v, [1, 0, 1, 2, 1, 1, 1], [], [], None, True, 13, 0.3, config=form)


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("ratio", [1, 4, 8])
def test_grouped_queries(ratio, form, check, random) -> None:
    """`ratio` query heads read one key head; two of them form a cluster."""
    count, heads = max(1, 4 * ratio // 8), ratio
    q, k, v = operands(random, 2 * count, 2, 2, 3, 18, 16)
    clusters = [h * 2 * count // (2 * heads) for h in range(2 * heads)]
    check(OP, q, k, v, clusters, [], [], None, True, 15, None, config=form)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_maps(form, check, random) -> None:
    q, k, v = operands(random, 3, 2, 3, 4, 18, 16)
    check(OP, q, k, v, [2, 0, 2, 1, 0, 0], [1, 0, 1], [2, 0, 2, 1, 1, 0], None, False, 0, None,
          config=form)  # fmt: skip


@pytest.mark.parametrize("form", TWO, ids=str)
@pytest.mark.parametrize(
    ("queries", "keys", "width", "wide"), [(1, 1, 16, 16), (1, 63, 24, 40), (37, 37, 80, 33)]
)
def test_odd_sizes(form, queries, keys, width, wide, check, random) -> None:
    q, k, v = operands(random, 2, 1, 3, queries, keys, width, wide)
    check(OP, q, k, v, [0, 1, 1], [], [], None, True, keys - queries, None, config=form)


@pytest.mark.parametrize("form", TWO, ids=str)
@pytest.mark.parametrize("offset", [-7, 0, 100])
def test_causal_offsets(form, offset, check, random) -> None:
    """With an offset below zero the first queries see no key and give zeros."""
    q, k, v = operands(random, 2, 2, 4, 9, 33, 16)
    found = check(OP, q, k, v, [0, 0, 1, 1], [], [], None, True, offset, None, config=form)
    assert torch.equal((found == 0).all(-1).sum(), torch.tensor(4 * max(0, -offset)))


@pytest.mark.parametrize("form", TWO, ids=str)
@pytest.mark.parametrize("shape", [(1, 2, 9, 33), (9, 33), (1, 1, 1, 33)])
@pytest.mark.parametrize("causal", [False, True])
def test_boolean_masks(form, shape, causal, check, random) -> None:
    q, k, v = operands(random, 2, 2, 4, 9, 33, 16)
    mask = random(*shape) > 0
    mask[..., -1, :] &= len(shape) == 4
    check(OP, q, k, v, [0, 0, 1, 1], [], [], mask, causal, 13, None, config=form)


@pytest.mark.parametrize("form", TWO, ids=str)
@pytest.mark.parametrize("hidden", [float("-inf"), torch.finfo(torch.float32).min, -10.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_additive_masks(form, hidden, dtype, check, random) -> None:
    """A row whose scores are all the least float is the mean of all values, as in PyTorch."""
    q, k, v = operands(random, 2, 2, 4, 9, 33, 16, dtype=dtype)
    hidden = max(hidden, torch.finfo(dtype).min) if hidden > float("-inf") else hidden
    mask = torch.where(random(1, 1, 9, 33) > 0, 0.0, hidden).to(dtype)
    mask[..., 4, :] = hidden if dtype == torch.float32 else 0.0
    check(OP, q, k, v, [0, 0, 1, 1], [], [], mask, False, 0, None, config=form)


@pytest.mark.parametrize("form", TWO, ids=str)
def test_strides(form, check, random) -> None:
    q, k = random(2, 9, 4, 16).transpose(1, 2)[:, ::2], random(2, 33, 2, 32).transpose(1, 2)
    v = random(2, 16, 4, 33).permute(0, 2, 3, 1)
    mask = (random(33, 9) > 0).T
    check(OP, q, k[..., :16], v, [0, 0, 1, 1], [], [], mask, False, 0, None, config=form)


@pytest.mark.parametrize("form", TWO, ids=str)
def test_large_scores(form, check, random) -> None:
    q, k, v = operands(random, 2, 2, 4, 9, 33, 16)
    check(OP, 100 * q, k, v, [0, 0, 1, 1], [], [], None, True, 13, None, config=form)


@pytest.mark.parametrize(
    ("queries", "dtype", "width"),
    [
        (1, torch.float32, 64),
        (1, torch.float16, 128),
        (20, torch.float16, 64),
        (20, torch.float32, 128),
    ],
)
def test_own_configs(queries, dtype, width, check, random) -> None:
    q, k, v = operands(random, 2, 2, 8, queries, 37, width, dtype=dtype)
    clusters = [0, 0, 0, 0, 1, 1, 1, 1]
    for form in OP.configs(q, k, v, clusters):
        check(OP, q, k, v, clusters, [], [], None, True, 37 - queries, None, config=form)


def test_empty_batch(check, random) -> None:
    q, k, v = (random(0, h, 4, 16) for h in (2, 2, 4))
    assert check(OP, q, k, v, [0, 0, 1, 1], [], [], None, True, 0, None).shape == (0, 4, 4, 16)


def test_a_nan_is_not_hidden_and_does_not_spread(random) -> None:
    q, k, v = operands(random, 1, 1, 2, 3, 20, 16)
    k[0, 0, 7] = torch.nan
    for form in (config(2), config(2, 2, packed=1)):
        found = OP.launch(form.options(), q, k, v, [0, 0], [], [], None, True, 6, None)
        assert found[:, :, 1:].isnan().all()
        assert found[:, :, 0].isfinite().all()
