"""`merge_equal_neurons`: planted copies merge, also rescaled ones where that is exact."""

import pytest
import torch
from building import Builder, aten
from checking import check_numbers, run_pass
from hypothesis import given
from hypothesis import strategies as st

from redpass.passes.merge_equal_neurons import MergeEqualNeurons


def rand(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def planted(width=8, ins=6, copies=((5, 2, 1.0),), seed=0):
    """A random matrix in which row i is `factor` times row j for each (i, j, factor)."""
    value = rand(width, ins, seed=seed)
    for i, j, factor in copies:
        value[i] = value[j] * factor
    return value


def plain(b, act, copies, bias=True):
    x = b.input("x", "batch", 6)
    whole = planted(ins=7, copies=copies)
    v = b.weight("up.bias", whole[:, 6].contiguous()) if bias else None
    h = b.call(aten.linear.default, x, b.weight("up.weight", whole[:, :6].contiguous()), v)
    y = b.call(aten.linear.default, b.call(act, h), b.weight("down.weight", rand(4, 8, seed=1)))
    return b.program(y)


def gated(b, gate_copies, up_copies, act=aten.silu.default):
    x = b.input("x", "batch", 6)
    gate = b.call(aten.linear.default, x, b.weight("gate", planted(copies=gate_copies)))
    up = b.call(aten.linear.default, x, b.weight("up", planted(copies=up_copies, seed=2)))
    h = b.call(aten.mul.Tensor, b.call(act, gate), up)
    return b.program(b.call(aten.linear.default, h, b.weight("down", rand(4, 8, seed=3))))


def width(checked, name="up.weight_kept"):
    return checked.after.weights[name].shape[0] if checked.plan.actions else 8


@pytest.mark.parametrize("act", [aten.gelu.default, aten.silu.default, aten.relu.default])
def test_copies_anywhere_merge_whatever_the_activation(check_pass, act):
    program = plain(Builder(), act, [(5, 2, 1.0), (7, 2, 1.0), (6, 0, 1.0)])
    name = "copies" if act is aten.gelu.default else None
    checked = check_pass(
        MergeEqualNeurons(multiple=1), program, [[rand(n, 6)] for n in (1, 5)], name
    )
    assert width(checked) == 5


def test_positive_factors_merge_under_relu_only(check_pass):
    copies = [(5, 2, 3.7), (7, 2, 1e-3), (6, 0, -1.0)]
    checked = check_pass(
        MergeEqualNeurons(multiple=1), plain(Builder(), aten.relu.default, copies), [[rand(3, 6)]]
    )
    assert width(checked) == 6
    assert (
        width(run_pass(MergeEqualNeurons(multiple=1), plain(Builder(), aten.gelu.default, copies)))
        == 8
    )


def test_in_a_gated_layer_up_may_have_any_factor_and_the_gate_none(check_pass):
    program = gated(Builder(), [(5, 2, 1.0), (7, 0, 2.0)], [(5, 2, -2.5), (7, 0, 1.0)])
    checked = check_pass(MergeEqualNeurons(multiple=1), program, [[rand(3, 6)]], "gated")
    assert width(checked, "up_kept") == 7


def test_a_channel_that_is_squared_has_no_free_factor():
    b = Builder()
    x = b.input("x", "batch", 6)
    h = b.call(aten.linear.default, x, b.weight("up", planted(copies=[(5, 2, 2.0)])))
    h = b.call(aten.mul.Tensor, h, h)
    program = b.program(b.call(aten.linear.default, h, b.weight("down", rand(4, 8))))
    assert not run_pass(MergeEqualNeurons(multiple=1), program).plan.actions


def test_vectors_between_must_be_equal_too():
    for same, merged in ((True, 7), (False, 8)):
        b = Builder()
        x, v = b.input("x", "batch", 6), rand(8, seed=4)
        v[5] = v[2] if same else v[2] + 1
        h = b.call(aten.linear.default, x, b.weight("up.weight", planted()))
        h = b.call(aten.gelu.default, b.call(aten.add.Tensor, h, b.weight("v", v)))
        program = b.program(b.call(aten.linear.default, h, b.weight("down", rand(4, 8))))
        checked = run_pass(MergeEqualNeurons(multiple=1), program)
        assert width(checked) == merged
        check_numbers(MergeEqualNeurons.exactness, program, checked.after, [rand(3, 6)])


def test_rows_that_differ_in_the_last_bit_are_not_equal():
    b = Builder()
    value = planted()
    value[5, 0] = torch.nextafter(value[5, 0], torch.tensor(10.0))
    h = b.call(aten.linear.default, b.input("x", "batch", 6), b.weight("up", value))
    h = b.call(aten.gelu.default, h)
    program = b.program(b.call(aten.linear.default, h, b.weight("down", rand(4, 8))))
    assert not run_pass(MergeEqualNeurons(multiple=1), program).plan.actions


def test_what_is_left_alone(check_pass):
    b = Builder()
    x = b.input("x", "batch", 6)
    outs = []
    for i, value in enumerate((planted(), rand(8, 6, seed=9), rand(8, 6, seed=8))):
        h = b.call(aten.linear.default, x, b.weight(f"up{i}", value))
        outs += [h] * (i == 2)
        h = b.call(aten.gelu.default, h)
        outs.append(b.call(aten.linear.default, h, b.weight(f"down{i}", rand(4, 8))))
    checked = check_pass(MergeEqualNeurons(), b.program(*outs), [[rand(3, 6)]], "left_alone")
    assert [skip.reason for skip in checked.plan.skips] == [
        "1 of 8 neurons: the rest is no multiple of 8",
        "no two neurons are equal",
        "linear_default_4 is read elsewhere too",
    ]


def test_equal_channels_of_convolutions_merge_and_others_are_left_alone(check_pass):
    b = Builder()
    x = b.input("x", "batch", 3, 5, 5)
    outs = []
    for i, (value, outs_) in enumerate(((planted(ins=27, copies=COPIES), 8), (rand(6, 27), 6))):
        kernel = b.weight(f"first{i}", value.reshape(outs_, 3, 3, 3))
        h = b.call(aten.relu.default, b.call(aten.conv2d.default, x, kernel))
        second = b.weight(f"second{i}", rand(4, outs_, 1, 1, seed=i))
        outs.append(b.call(aten.conv2d.default, h, second))
    inputs = [[rand(n, 3, 5, 5)] for n in (1, 3)]
    checked = check_pass(MergeEqualNeurons(multiple=1), b.program(*outs), inputs, "channels")
    assert width(checked, "first0") == 6
    assert "no two channels are equal" in {skip.reason for skip in checked.plan.skips}


COPIES = ((5, 2, 1.0), (7, 0, 3.5))


@given(
    data=st.data(),
    act=st.sampled_from([aten.gelu.default, aten.relu.default, aten.leaky_relu.default]),
    factor=st.sampled_from([1.0, 0.5, 3.3, 1e-4]),
)
def test_any_planted_copies_keep_the_meaning(data, act, factor):
    pairs = data.draw(st.lists(st.tuples(st.integers(4, 7), st.integers(0, 3)), max_size=4))
    sources = dict(pairs)
    copies = [(i, j, factor) for i, j in sources.items()]
    program = plain(Builder(), act, copies)
    checked = run_pass(MergeEqualNeurons(multiple=1), program)
    check_numbers(MergeEqualNeurons.exactness, program, checked.after, [rand(3, 6)])
    is_free = act is not aten.gelu.default or factor == 1.0
    # Where the factor counts, copies of one row are still equal to each other.
    groups = 0 if is_free else len(set(sources.values()))
    assert width(checked) == 8 - (len(sources) - groups)
