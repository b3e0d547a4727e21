"""`drop_constant_channels`: planted neurons go, with plain and gated activations."""

import pytest
import torch
from building import Builder, aten
from checking import check_numbers, run_pass
from hypothesis import given
from hypothesis import strategies as st

from redpass.passes.drop_constant_channels import DropConstantChannels

ACTIVATIONS = [aten.relu.default, aten.gelu.default, aten.silu.default, aten.tanh.default]


def rand(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def matrix(outs, ins, zero_rows=(), zero_columns=(), seed=0):
    value = rand(outs, ins, seed=seed)
    value[list(zero_rows)] = 0
    value[:, list(zero_columns)] = 0
    return value


def plain(b, x, act, width=8, dead=(1, 4), unread=(6,), bias=True):
    v = b.weight("up.bias", rand(width, seed=5).abs()) if bias else None
    h = b.call(aten.linear.default, x, b.weight("up.weight", matrix(width, 6, dead)), v)
    w = b.weight("down.weight", matrix(4, width, (), unread, seed=1))
    return b.call(aten.linear.default, b.call(act, h), w)


def gated(b, x, dead_gate=(1,), dead_up=(2,), act=aten.silu.default):
    gate = b.call(aten.linear.default, x, b.weight("gate.weight", matrix(8, 6, dead_gate)))
    up = b.call(aten.linear.default, x, b.weight("up.weight", matrix(8, 6, dead_up, seed=2)))
    h = b.call(aten.mul.Tensor, b.call(act, gate), up)
    return b.call(aten.linear.default, h, b.weight("down.weight", rand(4, 8, seed=3)))


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_constant_and_unread_channels_go_and_leave_their_part_in_the_bias(check_pass, act):
    b = Builder()
    program = b.program(plain(b, b.input("x", "batch", 6), act))
    name = "relu" if act is aten.relu.default else None
    inputs = [[rand(n, 6)] for n in (1, 5)]
    checked = check_pass(DropConstantChannels(multiple=1), program, inputs, name)
    assert checked.after.weights["up.weight_kept"].shape == (5, 6)
    assert checked.after.weights["down.weight_kept_bias"].shape == (4,)


def test_zeros_add_nothing_so_no_bias_is_made():
    b = Builder()
    program = b.program(plain(b, b.input("x", "batch", 6), aten.gelu.default, bias=False))
    after = run_pass(DropConstantChannels(multiple=1), program).after
    assert not [name for name in after.weights if "bias" in name]


def test_a_gate_that_is_zero_kills_its_channel(check_pass):
    b = Builder()
    program = b.program(gated(b, b.input("x", "batch", 6)))
    checked = check_pass(DropConstantChannels(multiple=1), program, [[rand(3, 6)]], "gated")
    assert checked.after.weights["down.weight_kept"].shape == (4, 6)


def test_a_gate_that_is_constant_but_not_zero_kills_nothing():
    b = Builder()
    program = b.program(gated(b, b.input("x", "batch", 6), (1,), (), act=aten.sigmoid.default))
    assert not run_pass(DropConstantChannels(multiple=1), program).plan.actions


def test_views_and_vectors_between_are_cut_too(check_pass):
    b = Builder()
    x = b.input("x", "batch", 7, 6)
    flat = b.call(aten.view.default, x, [-1, 6])
    w = b.weight("w1", matrix(8, 6, (0, 3)).t().contiguous())
    h = b.call(aten.addmm.default, b.weight("b1", rand(8)), flat, w)
    h = b.call(aten.view.default, h, [-1, 7, 8])
    h = b.call(aten.mul.Tensor, b.call(aten.gelu.default, h), b.weight("scale", rand(8, seed=4)))
    h = b.call(aten.dropout.default, h, 0.1, False)
    h = b.call(aten.reshape.default, h, [-1, 8])
    y = b.call(aten.mm.default, h, b.weight("w2", rand(8, 4)))
    program = b.program(y)
    checked = check_pass(DropConstantChannels(multiple=2), program, [[rand(2, 7, 6)]], "views")
    assert checked.after.weights["w1_kept"].shape == (6, 6)
    assert "addmm(" in checked.after.text


def test_one_channel_is_kept_when_all_are_constant():
    b = Builder()
    program = b.program(plain(b, b.input("x", "batch", 6), aten.relu.default, dead=range(8)))
    checked = run_pass(DropConstantChannels(multiple=1), program)
    assert checked.after.weights["up.weight_kept"].shape == (1, 6)
    check_numbers(DropConstantChannels.exactness, program, checked.after, [rand(3, 6)])


def test_what_is_left_alone(check_pass):
    b = Builder()
    x = b.input("x", "batch", 6)
    few = plain(b, x, aten.relu.default)
    w = b.weight("whole", rand(8, 6))
    whole = b.call(aten.linear.default, x, w)
    other = b.call(aten.linear.default, b.call(aten.relu.default, whole), b.weight("o", rand(4, 8)))
    tied = b.weight("tied", rand(8, 6))
    h = b.call(aten.relu.default, b.call(aten.linear.default, x, tied))
    second = b.call(aten.linear.default, h, b.weight("p", rand(4, 8)))
    mixed = b.call(aten.softmax.int, b.call(aten.linear.default, x, b.weight("r", rand(8, 6))), -1)
    up = b.call(aten.linear.default, x, b.weight("s", rand(8, 6)))
    third = b.call(
        aten.linear.default, b.call(aten.mul.Tensor, mixed, up), b.weight("t", rand(4, 8))
    )
    loud = b.call(aten.linear.default, x, b.weight("u", rand(8, 6)))
    fourth = b.call(aten.linear.default, b.call(aten.relu.default, loud), b.weight("v", rand(4, 8)))
    outs = [few, other, second, b.call(aten.neg.default, tied), third, loud, fourth]
    checked = check_pass(DropConstantChannels(), b.program(*outs), [[rand(3, 6)]], "left_alone")
    assert not checked.plan.actions
    reasons = [skip.reason for skip in checked.plan.skips]
    assert reasons == [
        "3 of 8 channels: the rest is no multiple of 8",
        "no channel is constant or unread",
        "the weight tied is read elsewhere too",
        "softmax_int is neither elementwise nor a linear",
        "linear_default_9 is read elsewhere too",
    ]


def test_a_narrow_linear_that_is_broadcast_is_an_obstacle():
    b = Builder()
    x = b.input("x", "batch", 6)
    one = b.call(aten.linear.default, x, b.weight("one", rand(1, 6)))
    up = b.call(aten.linear.default, x, b.weight("up", rand(8, 6)))
    y = b.call(aten.linear.default, b.call(aten.mul.Tensor, one, up), b.weight("d", rand(4, 8)))
    (skip,) = run_pass(DropConstantChannels(), b.program(y)).plan.skips
    assert skip.reason == "a linear above has another width"


def test_weights_without_data_say_nothing():
    b = Builder()
    x = b.input("x", "batch", 6)
    up, down = (torch.empty(s, device="meta") for s in ((8, 6), (4, 8)))
    h = b.call(aten.relu.default, b.call(aten.linear.default, x, b.weight("up", up)))
    program = b.program(b.call(aten.linear.default, h, b.weight("down", down)))
    (skip,) = run_pass(DropConstantChannels(), program).plan.skips
    assert skip.reason == "the weights carry no data"


def test_comparisons_between_are_obstacles():
    """`x > 0` is elementwise, but what it gives is no float: nothing is known of it."""
    b = Builder()
    x = b.input("x", "batch", 6)
    h = b.call(aten.linear.default, x, b.weight("up", matrix(8, 6, (1,))))
    mask = b.call(aten.gt.Scalar, h, 0)
    y = b.call(aten.linear.default, b.call(aten.mul.Tensor, h, mask), b.weight("d", rand(4, 8)))
    assert not run_pass(DropConstantChannels(multiple=1), b.program(y)).plan.actions


@given(
    dead=st.sets(st.integers(0, 7)),
    unread=st.sets(st.integers(0, 7)),
    multiple=st.sampled_from([1, 2, 4]),
    act=st.sampled_from(ACTIVATIONS),
)
def test_any_planted_channels(dead, unread, multiple, act):
    b = Builder()
    program = b.program(plain(b, b.input("x", "batch", 6), act, dead=dead, unread=unread))
    checked = run_pass(DropConstantChannels(multiple=multiple), program)
    check_numbers(DropConstantChannels.exactness, program, checked.after, [rand(3, 6)])
    if checked.plan.actions:
        assert checked.after.weights["up.weight_kept"].shape[0] % multiple == 0
