from __future__ import annotations

import pytest
import torch

from redpass.codegen.ops import OPS, Config

OP = OPS["add_norm"]


@pytest.mark.parametrize("norm", ["rms", "layer"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("width", [1, 63, 781])
def test_odd_widths(norm, dtype, width, check, random) -> None:
    x, residual = random(3, 5, width, dtype=dtype), random(3, 5, width, dtype=dtype)
    weight, bias = random(width, dtype=dtype), random(width, dtype=dtype)
    check(OP, x, residual, weight, bias, 1e-5, norm, bf16=True)


@pytest.mark.parametrize("rows", [1, 2, 8])
@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_several_rows_to_a_program(rows, norm, check, random) -> None:
    config = Config.of(BLOCK=128, ROWS=rows)
    check(OP, random(7, 100), random(7, 100), None, random(100), 1e-6, norm, config=config)


def test_strides(check, random) -> None:
    turned = random(6, 33, 4).transpose(1, 2)
    cut = random(6, 4, 50)[..., 5:38]
    check(OP, turned, cut, random(66)[::2], None, 1e-5, "rms")
    check(OP, cut, cut.expand(6, 4, 33), None, None, 1e-5, "layer")


def test_one_row_for_all(check, random) -> None:
    check(OP, random(33).expand(4, 33), random(4, 33), None, None, 1e-5, "rms")


def test_weights_of_another_dtype(check, random) -> None:
    x = random(4, 32, dtype=torch.float16)
    check(OP, x, x, random(32, dtype=torch.float16), None, 1e-5, "layer")


@pytest.mark.parametrize("shape", [(0, 16), (2, 0, 16)])
def test_empty_batch(shape, check, random) -> None:
    total, normed = check(OP, random(*shape), random(*shape), random(16), None, 1e-5, "rms")
    assert total.shape == normed.shape == shape


def test_large_values_and_constant_rows(check, random) -> None:
    check(OP, 1e4 * random(4, 63), random(4, 63), random(63), None, 1e-5, "layer")
    check(OP, torch.full((2, 63), 3.0), torch.zeros(2, 63), random(63), None, 1e-5, "layer")
