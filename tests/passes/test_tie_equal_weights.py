"""`tie_equal_weights` on graphs made by hand."""

import torch
from building import Builder, aten, special_values
from checking import run_pass

from redpass.passes.tie_equal_weights import TieEqualWeights


def test_weights_with_the_same_bits_are_stored_once(check_pass):
    b = Builder()
    x, w = b.input("x", "batch", 16), special_values(16, 16)
    a = b.call(aten.linear.default, x, b.weight("a.w", w))
    a = b.call(aten.linear.default, a, b.weight("b.w", w.clone()))
    a = b.call(aten.linear.default, a, b.weight("c.w", w.clone()))
    checked = check_pass(TieEqualWeights(), b.program(a), [[torch.randn(3, 16)]], "equal")
    assert list(checked.after.weights) == ["a.w"]
    assert checked.plan.actions[0].saving == {"bytes": 1024, "parameters": 256}


def test_a_lookup_reads_the_transpose(check_pass):
    b = Builder()
    ids, head = b.input("ids", "batch", dtype=torch.int64), torch.randn(16, 32)
    x = b.input("x", "batch", 16)
    scores = b.call(aten.matmul.default, x, b.weight("head", head))
    rows = b.call(aten.embedding.default, b.weight("table", head.t().contiguous()), ids)
    inputs = [[torch.tensor([3, 31, 0]), torch.randn(3, 16)]]
    checked = check_pass(TieEqualWeights(), b.program(scores, rows), inputs, "transposed")
    assert list(checked.after.weights) == ["head"]


def test_a_product_with_the_transpose_or_another_layout_stays(check_pass):
    b = Builder()
    x, w = b.input("x", "batch", 16), torch.randn(16, 16)
    made = [
        b.call(aten.mm.default, x, b.weight("a", w)),
        b.call(aten.mm.default, x, b.weight("turned", w.t().contiguous())),
        b.call(aten.mm.default, x, b.weight("strided", w.t().contiguous().t())),
        b.call(aten.mul.Tensor, x, b.weight("small", torch.ones(16))),
        b.call(aten.add.Tensor, x, b.weight("again", torch.ones(16))),
    ]
    checked = check_pass(
        TieEqualWeights(min_bytes=1024), b.program(*made), [[torch.randn(2, 16)]], "kept"
    )
    assert not checked.plan.actions
    assert len(checked.plan.skips) == 3


def test_bits_count_not_values():
    b = Builder()
    x, zeros = b.input("x", 512), torch.zeros(512)
    changed = zeros.clone()
    changed[255] = -0.0
    program = b.program(
        b.call(
            aten.mul.Tensor,
            b.call(aten.mul.Tensor, x, b.weight("a", zeros)),
            b.weight("b", changed),
        )
    )
    assert not run_pass(TieEqualWeights(), program).plan.actions
    nans = torch.full((512,), float("nan"))
    b = Builder()
    x = b.input("x", 512)
    first = b.call(aten.mul.Tensor, x, b.weight("a", nans))
    program = b.program(b.call(aten.mul.Tensor, first, b.weight("b", nans.clone())))
    assert len(run_pass(TieEqualWeights(), program).plan.actions) == 1


def test_shape_and_dtype_count():
    b = Builder()
    x = b.input("x", 16)
    made = [
        b.call(aten.add.Tensor, x, b.weight("a", torch.zeros(16, 16))),
        b.call(aten.add.Tensor, x, b.weight("b", torch.zeros(16, 16, dtype=torch.int32))),
        b.call(aten.add.Tensor, x, b.weight("c", torch.zeros(4, 4, 16))),
    ]
    program = b.program(*(b.call(aten.sum.default, value) for value in made))
    assert not run_pass(TieEqualWeights(), program).plan.actions


def test_small_weights_tie_too(check_pass):
    b = Builder()
    x = b.input("x", "batch", 4)
    a = b.call(aten.mul.Tensor, x, b.weight("a", torch.tensor(2.0)))
    a = b.call(aten.mul.Tensor, a, b.weight("b", torch.tensor(2.0)))
    checked = check_pass(TieEqualWeights(), b.program(a), [[special_values(2, 4)]])
    assert list(checked.after.weights) == ["a"]


def test_fake_weights_are_left_alone(check_pass):
    b = Builder()
    x = b.input("x", "batch", 4)
    out = b.call(aten.mul.Tensor, x, b.weight("a", torch.ones(4, device="meta")))
    checked = check_pass(TieEqualWeights(), b.program(out), [], "fake")
    assert len(checked.plan.skips) == 1
