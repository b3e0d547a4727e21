"""`fold_norm_gains`: gains leave when every reader is a linear that can take them."""

import torch
from building import Builder, aten
from checking import check_numbers, run_pass
from hypothesis import given
from hypothesis import strategies as st

from redpass.passes.fold_norm_gains import FoldNormGains


def rand(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def linear(b, x, name, outs, ins, bias=False):
    v = b.weight(f"{name}.bias", rand(outs, seed=9)) if bias else None
    return b.call(aten.linear.default, x, b.weight(f"{name}.weight", rand(outs, ins)), v)


def rms(b, x, name, width):
    gain = b.weight(name, 1 + rand(width, seed=3) / 4)
    return b.call(aten.rms_norm.default, x, [width], gain, 1e-6)


def test_a_gain_goes_into_all_linears_that_read_it(check_pass):
    b = Builder()
    n = rms(b, b.input("x", "batch", 7, 8), "gain", 8)
    program = b.program(linear(b, n, "q", 8, 8), linear(b, n, "k", 4, 8, bias=True))
    checked = check_pass(FoldNormGains(), program, [[rand(n, 7, 8)] for n in (1, 3)], "rms")
    assert "gain" not in checked.after.weights


def test_a_multiplication_goes_through_views_and_casts(check_pass):
    b = Builder()
    y = b.call(aten.mul.Tensor, b.weight("g", rand(8)), b.input("x", "batch", 7, 8))
    flat = b.call(aten.view.default, y, [-1, 8])
    out = b.call(aten.addmm.default, b.weight("b", rand(6)), flat, b.weight("w", rand(8, 6)))
    half = b.call(aten.to.dtype, y, torch.bfloat16)
    low = b.call(aten.linear.default, half, b.weight("low", rand(4, 8).bfloat16()))
    program = b.program(out, low)
    checked = check_pass(FoldNormGains(), program, [[rand(n, 7, 8)] for n in (1, 3)], "multiply")
    assert "mul" not in checked.after.text


def layer_norm(b, bias=True):
    x = b.input("x", "batch", 8)
    shift = b.weight("shift", rand(8, seed=4)) if bias else None
    n = b.call(aten.layer_norm.default, x, [8], b.weight("gain", rand(8, seed=3)), shift, 1e-5)
    return b.program(linear(b, n, "q", 8, 8), linear(b, n, "k", 4, 8, bias=True))


def test_layer_norms_are_folded_with_their_bias_when_asked(check_pass):
    checked = check_pass(
        FoldNormGains(layer_norms=True), layer_norm(Builder()), [[rand(3, 8)]], "layer_norm"
    )
    assert checked.after.weights["q.weight_scaled_bias"].shape == (8,)


def test_a_layer_norm_without_bias_adds_none():
    after = run_pass(FoldNormGains(layer_norms=True), layer_norm(Builder(), bias=False)).after
    assert "q.weight_scaled_bias" not in after.weights


def test_layer_norms_stay_unless_asked(check_pass):
    checked = check_pass(FoldNormGains(), layer_norm(Builder()), [[rand(3, 8)]], "layer_norm_stays")
    assert not checked.plan.actions


def test_what_is_left_alone(check_pass):
    b = Builder()
    x = b.input("x", "batch", 8)
    with_skip = rms(b, x, "g0", 8)
    outs = [linear(b, with_skip, "a", 8, 8), b.call(aten.neg.default, with_skip)]
    tied = b.weight("tied", rand(8, 8))
    outs += [b.call(aten.linear.default, rms(b, x, "g1", 8), tied), b.call(aten.neg.default, tied)]
    narrow = b.call(aten.view.default, rms(b, x, "g2", 8), [-1, 4])
    outs.append(linear(b, narrow, "c", 4, 4))
    outs.append(rms(b, x, "g3", 8))
    checked = check_pass(FoldNormGains(), b.program(*outs), [[rand(3, 8)]], "left_alone")
    assert [len(checked.plan.actions), len(checked.plan.skips)] == [0, 4]


def test_a_norm_that_nobody_reads(check_pass):
    b = Builder()
    x = b.input("x", "batch", 8)
    rms(b, x, "g", 8)
    check_pass(FoldNormGains(), b.program(linear(b, x, "a", 4, 8)), [[rand(3, 8)]], "unread")


def test_a_linear_that_reads_the_gain_as_its_matrix_is_no_reader_of_the_norm():
    b = Builder()
    x, w = b.input("x", "batch", 8), b.weight("g", rand(8))
    y = b.call(aten.mul.Tensor, x, w)
    program = b.program(linear(b, y, "a", 4, 8), b.call(aten.neg.default, w))
    assert run_pass(FoldNormGains(), program).after.weights["g"] is program.weights["g"]


def test_weights_without_data_fold_by_shape():
    b = Builder()
    gain, w = (torch.empty(s, device="meta") for s in ((8,), (4, 8)))
    y = b.call(aten.mul.Tensor, b.input("x", "batch", 8), b.weight("g", gain))
    program = b.program(b.call(aten.linear.default, y, b.weight("w", w)))
    assert run_pass(FoldNormGains(), program).after.weights["w_scaled"].is_meta


@given(rows=st.integers(1, 5), width=st.integers(2, 20), readers=st.integers(1, 3))
def test_any_width_and_number_of_readers(rows, width, readers):
    b = Builder()
    n = rms(b, b.input("x", "batch", width), "gain", width)
    program = b.program(*(linear(b, n, f"l{i}", i + 1, width, bias=i == 1) for i in range(readers)))
    after = run_pass(FoldNormGains(), program).after
    check_numbers(FoldNormGains.exactness, program, after, [rand(rows, width)])
    assert "gain" not in after.weights
