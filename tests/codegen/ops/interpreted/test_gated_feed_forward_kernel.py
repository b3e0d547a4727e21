from __future__ import annotations

import pytest
import torch

from redpass.codegen.ops import OPS, Config
from redpass.codegen.ops.activation import ACTIVATIONS

OP = OPS["gated_feed_forward"]
SMALL = Config.of(BLOCK_M=16, BLOCK_N=16, BLOCK_K=16, GROUP=2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("rows", "depth", "width"), [(1, 63, 33), (37, 32, 61), (63, 17, 1)])
def test_odd_sizes(dtype, rows, depth, width, check, random) -> None:
    x, gate, up = (random(n, depth, dtype=dtype) for n in (rows, width, width))
    check(OP, x, gate, up, None, None, "silu", config=SMALL, bf16=True)


@pytest.mark.parametrize(
    ("rows", "dtype"), [(16, torch.float16), (63, torch.float16), (63, torch.float32)]
)
def test_own_configs(rows, dtype, check, random) -> None:
    x, gate, up = (random(n, 100, dtype=dtype) for n in (rows, 151, 151))
    for config in OP.configs(x):
        check(OP, x, gate, up, None, None, "silu", config=config)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_and_biases(activation, check, random) -> None:
    x, gate, up = random(2, 3, 32), random(20, 32), random(20, 32)
    check(OP, x, gate, up, random(20), random(40)[::2], activation, config=SMALL)


def test_strides(check, random) -> None:
    x = random(3, 32, 7).transpose(1, 2)
    merged = random(40, 32)
    turned = random(32, 20).T
    check(OP, x, merged[:20], merged[20:], None, None, "silu", config=SMALL)
    check(OP, x[:, ::2], turned, merged[::2], None, None, "silu", config=SMALL)


@pytest.mark.parametrize("shape", [(0, 32), (2, 0, 32)])
def test_empty_batch(shape, check, random) -> None:
    check(OP, random(*shape), random(20, 32), random(20, 32), None, None, "silu")


def test_a_nan_is_not_hidden(random) -> None:
    x = torch.full((2, 32), torch.nan)
    for name in ACTIVATIONS:
        found = OP.launch(SMALL.options(), x, random(20, 32), random(20, 32), None, None, name)
        assert found.isnan().all()
