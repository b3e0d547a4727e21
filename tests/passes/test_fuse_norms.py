"""`fuse_norms`: every spelling of an RMS norm, and what only looks like one."""

import pytest
import torch
from building import Builder, aten
from checking import check_numbers, run_pass
from hypothesis import given
from hypothesis import strategies as st

from redpass.passes.fuse_norms import FuseNorms

EPS = 1e-6


def rand(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def root(b, x, dims=(-1,), square="pow"):
    squares = {
        "pow": lambda: b.call(aten.pow.Tensor_Scalar, x, 2),
        "mul": lambda: b.call(aten.mul.Tensor, x, x),
        "square": lambda: b.call(aten.square.default, x),
    }
    mean = b.call(aten.mean.dim, squares[square](), list(dims), True)
    return b.call(aten.add.Tensor, mean, EPS)


def norm(b, x, how="rsqrt", square="pow"):
    total = root(b, x, square=square)
    if how == "div":
        return b.call(aten.div.Tensor, x, b.call(aten.sqrt.default, total))
    if how == "reciprocal":
        inverse = b.call(aten.reciprocal.default, b.call(aten.sqrt.default, total))
    elif how == "power":
        inverse = b.call(aten.pow.Tensor_Scalar, total, -0.5)
    else:
        inverse = b.call(aten.rsqrt.default, total)
    return b.call(aten.mul.Tensor, inverse, x)


@pytest.mark.parametrize("how", ["rsqrt", "div", "reciprocal", "power"])
@pytest.mark.parametrize("square", ["pow", "mul", "square"])
def test_every_spelling_becomes_the_op(check_pass, how, square):
    b = Builder()
    program = b.program(norm(b, b.input("x", "batch", 7, 16), how, square))
    name = f"{how}_{square}" if (how, square) == ("div", "mul") else None
    checked = check_pass(FuseNorms(), program, [[rand(n, 7, 16)] for n in (1, 3)], name)
    assert [n.name for n in checked.after.graph.nodes if n.op == "call_function"] == [
        checked.plan.actions[0].target + "_fused"
    ]


def test_the_gain_goes_into_the_op_also_when_it_is_computed(check_pass):
    b = Builder()
    x = b.input("x", "batch", 16)
    one = b.call(aten.add.Tensor, b.weight("g", rand(16)), 1.0)
    first = b.call(aten.mul.Tensor, b.weight("w", rand(16, seed=1)), norm(b, x))
    second = b.call(aten.mul.Tensor, norm(b, first), one)
    checked = check_pass(FuseNorms(), b.program(second), [[rand(n, 16)] for n in (1, 3)], "gains")
    assert checked.rules == ["fuse_norms.root_mean_square"] * 2
    assert "= mul." not in checked.after.text


def test_casts_around_the_norm_stay(check_pass):
    b = Builder()
    x = b.input("x", "batch", 16, dtype=torch.bfloat16)
    wide = b.call(aten.to.dtype, x, torch.float32)
    narrow = b.call(aten.to.dtype, norm(b, wide), torch.bfloat16)
    y = b.call(aten.mul.Tensor, b.weight("w", rand(16).bfloat16()), narrow)
    checked = check_pass(FuseNorms(), b.program(y), [[rand(3, 16).bfloat16()]], "casts")
    assert checked.after.text.count("= to.dtype(") == 2
    assert "None" in checked.after.text


def test_a_gain_of_another_type_stays_a_multiplication():
    b = Builder()
    y = norm(b, b.input("x", "batch", 16))
    program = b.program(b.call(aten.mul.Tensor, y, b.weight("w", rand(16).double())))
    assert "mul" in run_pass(FuseNorms(), program).after.text


def test_a_normed_value_that_two_read_keeps_its_gains_apart():
    b = Builder()
    y = norm(b, b.input("x", "batch", 16))
    gains = [b.call(aten.mul.Tensor, y, b.weight(n, rand(16))) for n in "ab"]
    assert run_pass(FuseNorms(), b.program(*gains)).after.text.count("= mul.") == 2


def test_what_is_left_alone(check_pass):
    b = Builder()
    x, ragged = b.input("x", 3, 16), b.input("ragged", 3, "width")
    inverse = b.call(aten.rsqrt.default, root(b, x))
    read_twice = b.call(aten.mul.Tensor, x, inverse)
    other_axis = b.call(aten.mul.Tensor, x, b.call(aten.rsqrt.default, root(b, x, (0,))))
    unknown_width = norm(b, ragged)
    program = b.program(read_twice, inverse, other_axis, unknown_width)
    checked = check_pass(FuseNorms(), program, [[rand(3, 16), rand(3, 5)]], "left_alone")
    assert [len(checked.plan.actions), len(checked.plan.skips)] == [0, 3]


def test_what_only_looks_like_a_norm_is_no_candidate():
    b = Builder()
    x, y = b.input("x", "batch", 16), b.input("y", "batch", 16)
    others = b.call(aten.mul.Tensor, y, b.call(aten.rsqrt.default, root(b, x)))
    cube = b.call(aten.mean.dim, b.call(aten.pow.Tensor_Scalar, x, 3), [-1], True)
    cubed = b.call(aten.rsqrt.default, b.call(aten.add.Tensor, cube, EPS))
    square_root = b.call(aten.sqrt.default, root(b, x))
    wrong = [b.call(aten.mul.Tensor, x, cubed), b.call(aten.mul.Tensor, x, square_root)]
    plan = run_pass(FuseNorms(), b.program(others, *wrong)).plan
    assert not plan.actions
    assert not plan.skips


@given(rows=st.integers(1, 9), width=st.integers(1, 33), scale=st.sampled_from([1e-4, 1.0, 1e4]))
def test_any_size_keeps_its_meaning(rows, width, scale):
    b = Builder()
    program = b.program(norm(b, b.input("x", "batch", width)))
    after = run_pass(FuseNorms(), program).after
    check_numbers(FuseNorms.exactness, program, after, [rand(rows, width, seed=rows) * scale])
