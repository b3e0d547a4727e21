from __future__ import annotations

import pytest
import torch

from redpass.codegen.ops import OPS, Config
from redpass.codegen.ops.activation import ACTIVATIONS

OP = OPS["low_rank_linear"]


def small(parts=2):
    return Config.of(BLOCK_M=16, BLOCK_R=16, BLOCK_K=16, BLOCK_N=16, BLOCK_J=16, PARTS=parts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("rows", "depth", "rank", "width"), [(1, 63, 5, 33), (16, 17, 31, 1)])
@pytest.mark.parametrize("parts", [1, 3, 8])
def test_odd_sizes(dtype, rows, depth, rank, width, parts, check, random) -> None:
    x, down, up = (random(*s, dtype=dtype) for s in ((rows, depth), (rank, depth), (width, rank)))
    check(OP, x, down, up, None, "none", config=small(parts), bf16=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_own_configs(dtype, check, random) -> None:
    x, down, up = (random(*s, dtype=dtype) for s in ((3, 781), (40, 781), (130, 40)))
    for config in OP.configs(x, down, up):
        check(OP, x, down, up, random(130, dtype=dtype), "gelu", config=config)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_bias_and_activation(activation, check, random) -> None:
    x, down, up = random(2, 3, 32), random(7, 32), random(20, 7)
    check(OP, x, down, up, random(40)[::2], activation, config=small())


def test_strides(check, random) -> None:
    x = random(3, 32, 4).transpose(1, 2)
    check(OP, x, random(32, 7).T, random(40, 14)[::2, ::2], None, "none", config=small())
    check(OP, x[:, ::2], random(14, 32)[::2], random(7, 20).T, None, "none", config=small())


@pytest.mark.parametrize("shape", [(0, 32), (2, 0, 32)])
def test_empty_batch(shape, check, random) -> None:
    check(OP, random(*shape), random(7, 32), random(20, 7), None, "none")


def test_many_rows_are_left_to_the_library(random) -> None:
    down = random(7, 32)
    assert OP.pays(random(4, 4, 32), down)
    assert not OP.pays(random(17, 32), down)
