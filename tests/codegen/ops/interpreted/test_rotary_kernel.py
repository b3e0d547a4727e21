from __future__ import annotations

import pytest
import torch

from redpass.codegen.ops import OPS, Config

OP = OPS["rotary"]


def tables(random, *shape, dtype=torch.float32):
    angles = random(*shape)
    return angles.cos().to(dtype), angles.sin().to(dtype)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("positions", "heads", "width"), [(1, 3, 16), (63, 2, 80), (3, 1, 128), (5, 5, 2)]
)
def test_odd_sizes(dtype, interleaved, positions, heads, width, check, random) -> None:
    q, k = random(2, heads, positions, width, dtype=dtype), random(2, 1, positions, width).to(dtype)
    check(OP, q, k, *tables(random, 2, positions, width, dtype=dtype), interleaved, bf16=True)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rotated", [2, 12, 30])
def test_columns_past_the_rotated_ones_are_kept(rotated, interleaved, check, random) -> None:
    q, k = random(1, 2, 7, 40), random(1, 1, 7, 40)
    found, _ = check(OP, q, k, *tables(random, 1, 7, rotated), interleaved)
    assert torch.equal(found[..., rotated:], q[..., rotated:])


@pytest.mark.parametrize(("rows", "heads"), [(1, 1), (4, 3), (16, 4)])
def test_blocks(rows, heads, check, random) -> None:
    q, k = random(2, 4, 9, 32), random(2, 3, 9, 32)
    config = Config.of(ROWS=rows, HEADS=heads)
    check(OP, q, k, *tables(random, 2, 9, 32), False, config=config)


def test_strides_and_one_table_for_the_batch(check, random) -> None:
    both = random(3, 7, 6, 32)
    q, k = both[:, :, :4].transpose(1, 2), both[:, :, 4:].transpose(1, 2)
    cos, sin = tables(random, 1, 7, 32)
    check(OP, q, k, cos, sin, False)
    check(OP, q.mT.contiguous().mT, k, cos, sin, True)


def test_tables_of_another_dtype(check, random) -> None:
    q, k = random(1, 2, 5, 16, dtype=torch.float16), random(1, 2, 5, 16, dtype=torch.float16)
    check(OP, q, k, *tables(random, 1, 5, 16), False)


@pytest.mark.parametrize("shape", [(0, 2, 5, 16), (2, 2, 0, 16)])
def test_empty(shape, check, random) -> None:
    check(OP, random(*shape), random(*shape), *tables(random, shape[0], shape[2], 16), False)
