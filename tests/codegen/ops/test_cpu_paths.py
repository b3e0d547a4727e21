"""What runs on the CPU in place of a reference gives what the reference gives."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from redpass.codegen.ops import OPS
from redpass.codegen.ops.checking import disagreement
from redpass.codegen.ops.clustered_attention.cpu import FEW_QUERIES, MANY_KEYS, attend, head_tables
from redpass.codegen.ops.op import Op
from redpass.codegen.ops.rotary.cpu import SMALL

DTYPES = (torch.float32, torch.float64, torch.bfloat16)
Draw = Callable[..., torch.Tensor]


@pytest.fixture
def draw() -> Draw:
    generator = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(shape, generator=generator)


def agrees(name: str, *arguments) -> torch.Tensor:
    op = OPS[name]
    if op.inline is not None:
        check(op, arguments, op.inline(*arguments, *op.constants(*arguments)))
    found = op.cpu(*arguments)
    check(op, arguments, found)
    return found


def check(op: Op, arguments: tuple, found: torch.Tensor) -> None:
    """In float64 the truth is rounded as much as what is found."""
    if arguments[0].dtype == torch.float64:
        torch.testing.assert_close(found, op.reference(*arguments), rtol=1e-11, atol=1e-11)
    else:
        assert disagreement(op, arguments, found) == ""


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rotated", [32, 12])
def test_rotary(dtype, interleaved, rotated, draw) -> None:
    """Few positions run the chain of the reference, many write straight into the result."""
    for length in (7, SMALL // 256):
        q, k = draw(2, length, 4, 32).transpose(1, 2).to(dtype), draw(2, 1, length, 32).to(dtype)
        cos, sin = (draw(1, length, rotated).to(dtype) for _ in range(2))
        found = agrees("rotary", q, k, cos, sin, interleaved)
        assert all(t.is_contiguous() for t in found)


def test_rotary_with_tables_of_another_dtype(draw) -> None:
    q, k = draw(2, 4, 7, 32).half(), draw(2, 1, 7, 32).half()
    agrees("rotary", q, k, draw(1, 7, 32), draw(1, 7, 32), False)


@pytest.mark.parametrize("queries", [3, FEW_QUERIES + 1])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mask", ["none", "boolean", "added", "of one row", "of two axes"])
@pytest.mark.parametrize("causal", [False, True])
def test_clustered_attention(dtype, mask, causal, queries, draw) -> None:
    """A hidden row gives zeros; even clusters read shared keys in place, uneven ones gather them
    or, where queries are few and keys many, compute their weights once."""
    keys = MANY_KEYS
    q, k, v = (draw(2, h, n, 16).to(dtype) for h, n in ((2, queries), (2, keys), (4, keys)))
    seen = draw(1, 1, 1 if mask == "of one row" else queries, keys) > 0
    seen[..., 2:3, :] = False
    seen = seen[0, 0] if mask == "of two axes" else seen
    added = torch.where(seen, 0.0, float("-inf")).to(dtype)
    chosen = {"none": None, "added": added}.get(mask, seen)
    for clusters, values in (([0, 0, 1, 1], []), ([1, 0, 1, 1], [3, 1, 0, 2])):
        agrees("clustered_attention", q, k, v, clusters, [], values, chosen, causal, -1, None)


@pytest.mark.parametrize("queries", [1, FEW_QUERIES + 1])
@pytest.mark.parametrize(("groups", "count", "wide"), [(2, 4, 4), (2, 4, 8), (1, 2, 2), (4, 4, 4)])
def test_shared_keys(groups, count, wide, queries, draw) -> None:
    """Key heads of several clusters, value heads of several heads, and a mask a cluster; batches
    that lie close together and those that do not."""
    clusters = [head * count // 8 for head in range(8)]
    q, k, v = (draw(2, n, h, 16).transpose(1, 2)
               for h, n in ((count, queries), (groups, 9), (wide, 9)))  # fmt: skip
    mask = draw(2, count, queries, 9) > -0.5
    agrees("clustered_attention", q, k, v, clusters, [], [], None, False, 0, 0.2)
    agrees("clustered_attention", q, k, v, clusters, [], [], mask, False, 0, None)
    together = (t.contiguous() for t in (q, k, v))
    agrees("clustered_attention", *together, clusters, [], [], mask, False, 0, None)


def test_no_sharing_and_keys_in_another_order(draw) -> None:
    q, k, v = draw(2, 4, 6, 16), draw(2, 2, 9, 16), draw(2, 2, 9, 16)
    agrees("clustered_attention", q, k, v, [0, 1, 2, 3], [], [], None, False, 0, None)
    clusters = [0, 0, 1, 1, 2, 2, 3, 3]
    agrees("clustered_attention", q, k, v, clusters, [0, 1, 1, 0], [], None, False, 0, 0.2)


def test_shared_keys_are_not_copied(draw) -> None:
    """What is attended to is the memory that was given: nothing as large is allocated."""
    q, k, v = draw(1, 2, 40, 8), draw(1, 2, 4096, 8), draw(1, 8, 4096, 8)
    with torch.profiler.profile(profile_memory=True) as profile:
        attend(q, k, v, [0] * 4 + [1] * 4, [], [], None, False, 0, None)
    largest = max(event.self_cpu_memory_usage for event in profile.key_averages())
    assert largest < k.nbytes


def test_uneven_clusters_with_keys_of_their_own(draw) -> None:
    """Few queries on many keys; each cluster names its key head, each head its value head."""
    q, k, v = draw(2, 3, 2, 16), draw(2, 2, MANY_KEYS, 16), draw(2, 4, MANY_KEYS, 16)
    maps = [0, 1, 1, 2, 2, 2], [1, 0, 1], [3, 0, 1, 1, 2, 0]
    assert [len(table) for table in head_tables(q, k, v, *maps)] == [6, 6, 3, 6]
    assert [len(table) for table in head_tables(q, k[:, [0, 1, 1]], v, maps[0], [], [])] == [6, 6]
    agrees("clustered_attention", q, k, v, *maps, None, False, 0, 0.3)
    mask = draw(2, 3, 2, MANY_KEYS) > -0.5
    agrees("clustered_attention", q, k, v, *maps, mask, False, 0, None)


def test_empty(draw) -> None:
    q = draw(0, 2, 6, 16)
    agrees("clustered_attention", q, q, q, [0, 0, 1, 1], [], [], None, False, 0, None)
    agrees("rotary", q, q, draw(1, 6, 16), draw(1, 6, 16), False)
