"""Keys that are rebuilt are rotated at their positions, however the graph computes its tables."""

from __future__ import annotations

import operator

import pytest
import torch
from building import Builder, aten
from torch import fx

from redpass import rewrite
from redpass.data import Batches
from redpass.facts import Facts
from redpass.passes.cache_latents import CacheLatents
from redpass.program import Program
from redpass.verify.rules import check_rules

HEADS, WIDTH, LONGEST = 2, 4, 40


def rotated(b: Builder, x: fx.Node, cos: fx.Node, sin: fx.Node) -> fx.Node:
    first = b.call(aten.slice.Tensor, x, 3, 0, WIDTH // 2)
    second = b.call(aten.slice.Tensor, x, 3, WIDTH // 2, 2**63 - 1)
    turned = b.call(aten.cat.default, [b.call(aten.neg.default, second), first], -1)
    left, right = b.call(aten.mul.Tensor, x, cos), b.call(aten.mul.Tensor, turned, sin)
    return b.call(aten.add.Tensor, left, right)


def tables(b: Builder, form: str, seq: fx.Node, past: fx.Node) -> list[fx.Node]:
    rates = torch.tensor([1.0, 0.3]).repeat(2)
    if form == "sliced table":
        angles = torch.arange(LONGEST).unsqueeze(1) * rates
        end = b.call(operator.add, past, seq)
        whole = (b.weight("cos", angles.cos()), b.weight("sin", angles.sin()))
        return [b.call(aten.slice.Tensor, table, 0, past, end) for table in whole]
    if form == "range from past":
        positions = b.call(aten.arange.start, past, b.call(operator.add, past, seq))
    else:
        positions = b.call(aten.add.Tensor, b.call(aten.arange.default, seq), past)
    numbers = b.call(aten.unsqueeze.default, b.call(aten.to.dtype, positions, torch.float32), 1)
    angle = b.call(aten.mul.Tensor, numbers, b.weight("rates", rates))
    return [b.call(op, angle) for op in (aten.cos.default, aten.sin.default)]


def attention(form: str) -> Program:
    """One branch with rotated keys and a cache."""
    torch.manual_seed(0)
    b, size = Builder(), HEADS * WIDTH
    x = b.input("x", "batch", "seq", size)
    kept = [b.input(f"past_{kind}", "batch", HEADS, "past", WIDTH) for kind in "kv"]
    batch, seq = (b.call(aten.sym_size.int, x, axis) for axis in (0, 1))
    past = b.call(aten.sym_size.int, kept[0], 2)
    cos, sin = tables(b, form, seq, past)
    heads = []
    for kind in "qkv":
        flat = b.call(aten.linear.default, x, b.weight(kind, torch.randn(size, size)))
        split = b.call(aten.view.default, flat, [batch, seq, HEADS, WIDTH])
        heads.append(b.call(aten.transpose.int, split, 1, 2))
    query, key = (rotated(b, item, cos, sin) for item in heads[:2])
    news = (key, heads[2])
    joined = [b.call(aten.cat.default, [kept[i], news[i]], 2) for i in range(2)]
    y = b.call(aten.scaled_dot_product_attention.default, query, *joined)
    flat = b.call(aten.reshape.default, b.call(aten.transpose.int, y, 1, 2), [batch, seq, size])
    out = b.call(aten.linear.default, flat, b.weight("o", torch.randn(size, size)))
    pairs = (("past_k", "present_k"), ("past_v", "present_v"))
    return b.program(b.call(aten.add.Tensor, x, out), *joined, state=pairs)


def calls(program: Program, x: torch.Tensor) -> torch.Tensor:
    shapes = [port.shape for port in program.signature.inputs[1:]]
    state = [torch.zeros(len(x), int(shape[1]), 0, int(shape[3])) for shape in shapes]
    found = []
    for part in x.split([5, 1, 3], 1):
        out, *state = program(part, *state)
        found.append(out)
    return torch.cat(found, 1)


@pytest.mark.parametrize("form", ["range plus past", "range from past", "sliced table"])
@pytest.mark.parametrize("size", [1, 2])
def test_full_rank_changes_nothing_from_call_to_call(form: str, size: int) -> None:
    program = attention(form)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, 9, HEADS * WIDTH, generator=generator)
    pass_ = CacheLatents(shares=(1.0,), multiple=1, keys="rebuilt", group_size=size)
    plan = pass_.plan(program, Facts(program, Batches(({"x": x},), "random")))
    assert len(plan.actions) == 2, plan.skips
    after = rewrite.apply(program, plan.actions)
    check_rules(after, paranoid=True)
    assert torch.allclose(calls(after, x), calls(program, x), atol=1e-4)
