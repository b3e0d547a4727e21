"""What runs on the CPU in place of a reference gives what the reference gives."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from redpass.codegen.ops import OPS
from redpass.codegen.ops.checking import disagreement
from redpass.codegen.ops.clustered_attention import cpu

DTYPES = (torch.float32, torch.float64, torch.bfloat16)
Draw = Callable[..., torch.Tensor]


@pytest.fixture
def draw() -> Draw:
    generator = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(shape, generator=generator)


def agrees(name: str, *arguments) -> torch.Tensor:
    found = OPS[name].cpu(*arguments)
    assert disagreement(OPS[name], arguments, found) == ""
    return found


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rotated", [32, 12])
def test_rotary(dtype, interleaved, rotated, draw) -> None:
    q, k = draw(2, 7, 4, 32).transpose(1, 2).to(dtype), draw(2, 1, 7, 32).to(dtype)
    cos, sin = (draw(1, 7, rotated).to(dtype) for _ in range(2))
    found = agrees("rotary", q, k, cos, sin, interleaved)
    assert all(t.is_contiguous() for t in found)


def test_rotary_with_tables_of_another_dtype(draw) -> None:
    q, k = draw(2, 4, 7, 32).half(), draw(2, 1, 7, 32).half()
    agrees("rotary", q, k, draw(1, 7, 32), draw(1, 7, 32), False)


@pytest.mark.parametrize("at_once", [2**20, 40])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mask", ["none", "boolean", "added", "of one row"])
@pytest.mark.parametrize("causal", [False, True])
def test_clustered_attention(dtype, mask, causal, at_once, draw, monkeypatch) -> None:
    """A hidden row gives zeros; some queries at a time give what all at once do."""
    monkeypatch.setattr(cpu, "AT_ONCE", at_once)
    q, k, v = (draw(2, h, n, 16).to(dtype) for h, n in ((2, 6), (2, 9), (4, 9)))
    seen = draw(1, 1, 1 if mask == "of one row" else 6, 9) > 0
    seen[..., 2:3, :] = False
    added = torch.where(seen, 0.0, float("-inf")).to(dtype)
    chosen = {"none": None, "added": added}.get(mask, seen)
    for clusters, values in (([0, 0, 1, 1], []), ([1, 0, 1, 1], [3, 1, 0, 2])):
        agrees("clustered_attention", q, k, v, clusters, [], values, chosen, causal, -1, None)


def test_shared_keys_and_no_sharing(draw) -> None:
    q, k, v = draw(2, 4, 6, 16), draw(2, 2, 9, 16), draw(2, 2, 9, 16)
    agrees("clustered_attention", q, k, v, [0, 1, 2, 3], [], [], None, False, 0, None)
    clusters = [0, 0, 1, 1, 2, 2, 3, 3]
    agrees("clustered_attention", q, k, v, clusters, [0, 1, 1, 0], [], None, False, 0, 0.2)


def test_empty(draw) -> None:
    q = draw(0, 2, 6, 16)
    agrees("clustered_attention", q, q, q, [0, 0, 1, 1], [], [], None, False, 0, None)
    agrees("rotary", q, q, draw(1, 6, 16), draw(1, 6, 16), False)
