"""`fuse_activations`: functions are told by their values, whatever the spelling."""

import math

import pytest
import torch
from building import Builder, aten
from checking import run_pass

from redpass.passes.fuse_activations import FuseActivations

ROOT = math.sqrt(2 / math.pi)
mul, add = aten.mul.Tensor, aten.add.Tensor


def rand(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def gelu_new(b, x, root=ROOT):
    cube = b.call(mul, b.call(aten.pow.Tensor_Scalar, x, 3.0), 0.044715)
    inner = b.call(aten.tanh.default, b.call(mul, b.call(add, x, cube), root))
    return b.call(mul, b.call(mul, x, 0.5), b.call(add, inner, 1.0))


def gelu_fast(b, x):
    squared = b.call(add, b.call(mul, b.call(mul, x, 0.044715), x), 1.0)
    inner = b.call(mul, b.call(mul, x, ROOT), squared)
    return b.call(mul, b.call(mul, x, 0.5), b.call(add, b.call(aten.tanh.default, inner), 1.0))


def gelu_erf(b, x):
    erf = b.call(aten.erf.default, b.call(aten.div.Tensor, x, math.sqrt(2.0)))
    return b.call(mul, b.call(mul, x, 0.5), b.call(add, erf, 1.0))


def silu(b, x):
    return b.call(mul, b.call(aten.sigmoid.default, x), x)


@pytest.mark.parametrize("spelling", [gelu_new, gelu_fast, gelu_erf, silu])
def test_every_spelling_becomes_the_op(check_pass, spelling):
    b = Builder()
    x = b.input("x", "batch", 8)
    program = b.program(spelling(b, b.call(aten.neg.default, x)))
    checked = check_pass(
        FuseActivations(), program, [[4 * rand(n, 8)] for n in (1, 3)], spelling.__name__
    )
    assert len(checked.plan.actions) == 1
    assert len([n for n in checked.after.graph.nodes if n.op == "call_function"]) == 2


def test_a_rounded_constant_is_another_function(check_pass):
    b = Builder()
    program = b.program(gelu_new(b, b.input("x", "batch", 8), root=0.79788456))
    checked = check_pass(FuseActivations(), program, [[rand(3, 8)]], "rounded")
    assert [len(checked.plan.actions), len(checked.plan.skips)] == [0, 1]


def test_other_functions_and_two_sources_are_no_candidates():
    b = Builder()
    x, y = b.input("x", "batch", 8), b.input("y", "batch", 8)
    quick = b.call(mul, x, b.call(aten.sigmoid.default, b.call(mul, x, 1.702)))
    gated = b.call(mul, b.call(aten.sigmoid.default, x), y)
    plan = run_pass(FuseActivations(), b.program(quick, gated)).plan
    assert not plan.actions
    assert not plan.skips


def test_what_other_values_read_inside_stays():
    b = Builder()
    x = b.input("x", "batch", 8)
    gate = b.call(aten.sigmoid.default, x)
    program = b.program(b.call(mul, gate, x), gate)
    after = run_pass(FuseActivations(), program).after
    assert "silu(" in after.text
    assert "sigmoid(" in after.text


def test_long_regions_are_not_evaluated():
    b = Builder()
    x = b.input("x", "batch", 8)
    y = x
    for _ in range(40):
        y = b.call(aten.neg.default, y)
    assert not run_pass(FuseActivations(), b.program(b.call(mul, y, x))).plan.actions
