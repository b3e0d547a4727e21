"""`drop_neutral_operands` on graphs made by hand."""

import pytest
import torch
from building import Builder, aten, special_values
from checking import run_pass

from redpass.passes.drop_neutral_operands import DropNeutralOperands


def test_numbers_that_change_nothing(check_pass):
    b = Builder()
    x, ids = b.input("x", "batch", 4), b.input("ids", "batch", dtype=torch.int64)
    one = b.weight("one", torch.tensor(1.0))
    a = b.call(aten.mul.Tensor, b.call(aten.div.Tensor, x, 1.0), 1)
    a = b.call(aten.sub.Tensor, b.call(aten.mul.Tensor, one, a), 0.0)
    a = b.call(aten.add.Tensor, a, -0.0)
    c = b.call(aten.add.Tensor, ids, 0)
    program = b.program(b.call(aten.neg.default, a), b.call(aten.neg.default, c))
    inputs = [[special_values(n, 4), torch.arange(n)] for n in (1, 2, 9)]
    checked = check_pass(DropNeutralOperands(), program, inputs, "numbers")
    assert len(checked.plan.actions) == 6
    assert not checked.after.weights


def test_numbers_that_change_something(check_pass):
    b = Builder()
    x, ids = b.input("x", "batch", 4), b.input("ids", "batch", dtype=torch.int64)
    made = [
        b.call(aten.add.Tensor, x, 0.0),
        b.call(aten.sub.Tensor, x, -0.0),
        b.call(aten.add.Tensor, x, 0.0, alpha=2),
        b.call(aten.div.Tensor, ids, 1),
        b.call(aten.div.Tensor_mode, x, 1.0, rounding_mode="floor"),
        b.call(aten.mul.Tensor, ids, 1.0),
        b.call(aten.mul.Tensor, x, b.weight("wide", torch.ones(2, 1, 1))),
        b.call(aten.sub.Tensor, b.weight("zero", torch.zeros(4)), x),
    ]
    checked = check_pass(DropNeutralOperands(), b.program(*made), [], "kept")
    assert not checked.plan.actions
    assert len(checked.plan.skips) == 2


def test_parts_without_elements(check_pass):
    b = Builder()
    x = b.input("x", "batch", 4)
    empty, legacy = b.weight("empty", torch.ones(0, 4)), b.weight("legacy", torch.ones(0))
    alone = b.call(aten.cat.default, [legacy, x, empty])
    pair = b.call(aten.cat.default, [empty, alone, x], 0)
    single = b.call(aten.cat.default, [pair], 1)
    program = b.program(b.call(aten.relu.default, single))
    inputs = [[special_values(n, 4)] for n in (1, 3)]
    checked = check_pass(DropNeutralOperands(), program, inputs, "parts")
    assert len(checked.plan.actions) == 3
    assert not checked.after.weights


def test_parts_that_decide_the_dtype_stay():
    b = Builder()
    ids = b.input("ids", "batch", dtype=torch.int64)
    empty = b.weight("empty", torch.ones(0))
    joined = b.call(aten.cat.default, [empty, ids])
    assert not run_pass(DropNeutralOperands(), b.program(joined)).plan.actions


def test_masks_that_are_the_same_everywhere(check_pass):
    b = Builder()
    x, m = b.input("x", "batch", 4), b.input("m", 4, dtype=torch.bool)
    yes, no = b.weight("yes", torch.ones(4).bool()), b.weight("no", torch.zeros(4).bool())
    outputs = [
        b.call(aten.neg.default, b.call(aten.masked_fill.Scalar, x, no, 3.0)),
        b.call(aten.neg.default, b.call(aten.where.self, yes, x, b.call(aten.exp.default, x))),
        b.call(aten.abs.default, b.call(aten.where.self, no, b.call(aten.exp.default, x), x)),
        b.call(aten.logical_not.default, b.call(aten.bitwise_and.Tensor, m, yes)),
        b.call(aten.logical_not.default, b.call(aten.logical_or.default, no, m)),
    ]
    inputs = [[special_values(n, 4), torch.tensor([True, False, True, False])] for n in (1, 3)]
    checked = check_pass(DropNeutralOperands(), b.program(*outputs), inputs, "masks")
    assert len(checked.plan.actions) == 5


@pytest.mark.parametrize("mask", [[True, False], [False, True]])
def test_masks_that_differ_stay(check_pass, mask):
    b = Builder()
    x, m = b.input("x", "batch", 2), b.weight("m", torch.tensor(mask))
    wide = b.call(
        aten.where.self, b.weight("one", torch.tensor([True])), b.weight("s", torch.ones(())), x
    )
    outputs = b.call(aten.masked_fill.Scalar, x, m, 3.0), wide
    checked = check_pass(DropNeutralOperands(), b.program(*outputs), [[special_values(3, 2)]])
    assert not checked.plan.actions
