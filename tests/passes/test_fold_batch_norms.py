"""`fold_batch_norms`: after and before convolutions of every kind, and what must stay."""

import operator

import pytest
import torch
from building import Builder, aten
from checking import run_pass

from redpass.passes.fold_batch_norms import FoldBatchNorms


def rand(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def norm(b, x, channels, name="n", training=False, affine=True):
    names = ("gain", "bias", "mean")
    gain, bias, mean = (
        b.weight(f"{name}.{k}", rand(channels, seed=i)) for i, k in enumerate(names)
    )
    variance = b.weight(f"{name}.variance", rand(channels, seed=4).abs() + 0.1)
    gain, bias = (gain, bias) if affine else (None, None)
    args = (x, gain, bias, mean, variance, training, 0.1, 1e-5, False)
    return b.call(aten.batch_norm.default, *args)


def conv(b, x, name, outs, ins, kernel=(3, 3), bias=True, **options):
    w = b.weight(f"{name}.weight", rand(outs, ins, *kernel, seed=7))
    v = b.weight(f"{name}.bias", rand(outs, seed=8)) if bias else None
    target = {1: aten.conv1d.default, 2: aten.conv2d.default, 3: aten.conv3d.default}[len(kernel)]
    ones = [1] * len(kernel)
    padding = [options.get("padding", 0)] * len(kernel)
    return b.call(target, x, w, v, ones, padding, ones, options.get("groups", 1))


def image(b, channels, *sizes):
    return b.input("x", "batch", channels, *(sizes or (6, 5)))


def test_after_a_convolution_with_padding_and_groups(check_pass):
    b = Builder()
    y = norm(b, conv(b, image(b, 4), "c", 6, 2, groups=2, padding=1), 6)
    inputs = [[rand(n, 4, 6, 5)] for n in (1, 3)]
    checked = check_pass(FoldBatchNorms(), b.program(y), inputs, "after")
    assert "batch_norm" not in checked.after.text
    assert checked.rules == ["fold_batch_norms.after_layer"]


@pytest.mark.parametrize("kernel", [(3,), (2, 2), (2, 1, 2)])
def test_in_one_two_and_three_dimensions_without_bias(check_pass, kernel):
    b = Builder()
    sizes = (4, 5, 3)[: len(kernel)]
    y = norm(b, conv(b, image(b, 3, *sizes), "c", 4, 3, kernel, bias=False), 4, affine=False)
    checked = check_pass(FoldBatchNorms(), b.program(y), [[rand(2, 3, *sizes)]])
    assert checked.plan.actions


def test_after_a_transposed_convolution_and_a_linear(check_pass):
    b = Builder()
    up = b.call(aten.conv_transpose2d.input, image(b, 3), b.weight("up", rand(3, 4, 2, 2)))
    row = b.input("row", "batch", 5)
    low = b.call(aten.linear.default, row, b.weight("low", rand(4, 5)))
    program = b.program(norm(b, up, 4), norm(b, low, 4, "m"))
    checked = check_pass(FoldBatchNorms(), program, [[rand(2, 3, 6, 5), rand(2, 5)]])
    assert len(checked.plan.actions) == 2


def test_before_a_convolution_without_padding_in_groups(check_pass):
    b = Builder()
    y = conv(b, norm(b, image(b, 4), 4), "c", 6, 2, groups=2)
    row = b.input("row", "batch", 5)
    z = b.call(aten.linear.default, norm(b, row, 5, "m"), b.weight("low", rand(4, 5)))
    checked = check_pass(
        FoldBatchNorms(), b.program(y, z), [[rand(2, 4, 6, 5), rand(2, 5)]], "before"
    )
    assert checked.rules == ["fold_batch_norms.before_layer"] * 2


def test_padding_given_in_words(check_pass):
    b = Builder()
    for_word = {"valid": 1, "same": 0}
    x = image(b, 3)
    outs = []
    for word in for_word:
        w = b.weight(word, rand(4, 3, 3, 3))
        outs.append(b.call(aten.conv2d.padding, norm(b, x, 3, f"n{word}"), w, None, [1, 1], word))
    checked = check_pass(FoldBatchNorms(), b.program(*outs), [[rand(2, 3, 6, 5)]])
    assert len(checked.plan.actions) == 1


def test_a_layer_between_two_norms_takes_both(check_pass):
    b = Builder()
    y = norm(b, conv(b, norm(b, image(b, 4), 4), "c", 6, 4), 6, "m")
    checked = check_pass(FoldBatchNorms(), b.program(y), [[rand(2, 4, 6, 5)]], "both")
    assert "batch_norm(" not in checked.after.text


def test_a_norm_that_cannot_go_does_not_hold_the_one_behind_the_layer():
    b = Builder()
    y = norm(b, conv(b, norm(b, image(b, 4), 4), "c", 6, 4, padding=1), 6, "m")
    checked = run_pass(FoldBatchNorms(), b.program(y))
    assert [len(checked.plan.actions), len(checked.plan.skips)] == [1, 1]


def test_what_is_left_alone(check_pass):
    b = Builder()
    x = image(b, 4)
    read_twice = conv(b, x, "twice", 4, 4)
    outs = [read_twice, norm(b, read_twice, 4, "n0")]
    outs.append(conv(b, norm(b, x, 4, "n2"), "padded", 4, 4, padding=1))
    outs.append(norm(b, b.call(aten.relu.default, x), 4, "n3"))
    shared = conv(b, x, "shared", 4, 4)
    weight = next(n for n in b.graph.nodes if n.name == "shared_weight")
    outs += [norm(b, shared, 4, "n4"), b.call(aten.neg.default, weight)]
    rows = b.input("rows", "batch", 5, 3)
    outs.append(norm(b, b.call(aten.linear.default, rows, b.weight("low", rand(4, 3))), 5, "n5"))
    w = b.weight("up", rand(4, 2, 2, 2))
    grouped = b.call(aten.conv_transpose2d.input, x, w, None, [1, 1], [0, 0], [0, 0], 2)
    outs.append(norm(b, grouped, 4, "n6"))
    program = b.program(*outs)
    checked = check_pass(
        FoldBatchNorms(), program, [[rand(2, 4, 6, 5), rand(2, 5, 3)]], "left_alone"
    )
    assert [len(checked.plan.actions), len(checked.plan.skips)] == [0, 6]


def test_a_norm_of_the_batch_stays(check_pass):
    b = Builder()
    x = conv(b, image(b, 4), "c", 4, 4)
    args = (x, None, None, None, None, True, 0.1, 1e-5, False)
    program = b.program(b.call(aten.batch_norm.default, *args))
    checked = check_pass(FoldBatchNorms(), program, [[rand(3, 4, 6, 5)]], "of_the_batch")
    assert [len(checked.plan.actions), len(checked.plan.skips)] == [0, 1]


@pytest.mark.parametrize("follows", [True, False])
def test_the_decomposed_op_that_gives_a_tuple(check_pass, follows):
    b = Builder()
    x = image(b, 4)
    value = conv(b, x, "c", 4, 4) if follows else x
    stats = [b.weight(k, rand(4, seed=i).abs() + 0.1) for i, k in enumerate("gbmv")]
    op = aten._native_batch_norm_legit_no_training.default
    y = b.call(operator.getitem, b.call(op, value, *stats, 0.1, 1e-5), 0)
    y = y if follows else conv(b, y, "c", 4, 4)
    checked = check_pass(FoldBatchNorms(), b.program(y), [[rand(2, 4, 6, 5)]])
    assert "batch_norm" not in checked.after.text


def test_weights_without_data_fold_by_shape():
    b = Builder()
    w = b.weight("w", torch.empty(4, 3, 3, 3, device="meta"))
    x = b.call(aten.conv2d.default, image(b, 3), w)
    stats = [b.weight(k, torch.empty(4, device="meta")) for k in "gbmv"]
    y = b.call(aten.batch_norm.default, x, *stats, False, 0.1, 1e-5, False)
    assert run_pass(FoldBatchNorms(), b.program(y)).after.weights["w_normed"].is_meta
