"""`fold_constants` on graphs made by hand."""

import operator

import pytest
import torch
from building import Builder, aten, special_values
from checking import run_pass

from redpass.passes.fold_constants import FoldConstants


def test_a_chain_over_a_weight_becomes_one_weight(check_pass):
    b = Builder()
    x, w = b.input("x", "batch", 4), b.weight("freq", special_values(4))
    scaled = b.call(aten.exp.default, b.call(aten.mul.Tensor, w, 2.0))
    program = b.program(b.call(aten.mul.Tensor, x, scaled))
    inputs = [[special_values(n, 4, seed=1)] for n in (1, 5)]
    checked = check_pass(FoldConstants(), program, inputs, "chain")
    assert list(checked.after.weights) == ["exp_default_folded"]


def test_literals_are_computed_ahead(check_pass):
    b = Builder()
    x = b.input("x", "batch", 6)
    positions = b.call(aten.arange.default, 6, dtype=torch.float32)
    mask = b.call(aten.tril.default, b.call(aten.ones.default, [6, 6]))
    out = b.call(aten.matmul.default, b.call(aten.add.Tensor, x, positions), mask)
    checked = check_pass(FoldConstants(), b.program(out), [[special_values(2, 6)]], "literals")
    assert len(checked.plan.actions) == 2


def test_a_result_over_the_limit_is_left_and_its_small_operands_folded(check_pass):
    b = Builder()
    x = b.input("x", "batch", 64)
    row = b.call(aten.mul.Tensor, b.call(aten.arange.default, 64, dtype=torch.float32), 2)
    table = b.call(aten.add.Tensor, row, b.call(aten.unsqueeze.default, row, 1))
    program = b.program(b.call(aten.mm.default, x, b.call(aten.relu.default, table)))
    checked = check_pass(FoldConstants(max_bytes=1024), program, [[torch.ones(2, 64)]], "limit")
    assert [action.target for action in checked.plan.actions] == ["mul_tensor"]
    assert not run_pass(FoldConstants(max_bytes=0), program).plan.actions


def test_a_large_result_that_frees_its_weights_is_folded(check_pass):
    b = Builder()
    x = b.input("x", "batch", 32)
    product = b.call(
        aten.add.Tensor, b.weight("a", torch.randn(32, 32)), b.weight("b", torch.ones(32, 32))
    )
    program = b.program(b.call(aten.mm.default, x, b.call(aten.t.default, product)))
    checked = check_pass(FoldConstants(max_bytes=0), program, [[torch.randn(3, 32)]], "frees")
    (weight,) = checked.after.weights.values()
    assert weight.stride() == (1, 32)


def test_views_of_tied_weights_are_not_stored_twice(check_pass):
    b = Builder()
    ids = b.input("ids", "batch", dtype=torch.int64)
    table = b.weight("table", torch.randn(8, 4))
    hidden = b.call(aten.embedding.default, table, ids)
    head = b.call(aten.t.default, b.call(aten.view.default, table, [8, 4]))
    scale = b.call(aten.slice.Tensor, b.weight("scale", torch.ones(9)), 0, 0, 4)
    out = b.call(aten.mm.default, b.call(aten.mul.Tensor, hidden, scale), head)
    checked = check_pass(FoldConstants(), b.program(out), [[torch.tensor([1, 7, 0])]], "tied")
    assert not checked.plan.actions


def test_returned_and_multiple_values_stay(check_pass):
    b = Builder()
    x, w = b.input("x", "batch", 4), b.weight("w", torch.arange(8.0))
    returned = b.call(aten.neg.default, b.weight("v", torch.ones(4)))
    parts = b.call(aten.split.Tensor, w, 4)
    first, second = b.call(operator.getitem, parts, 0), b.call(operator.getitem, parts, 1)
    out = b.call(aten.add.Tensor, b.call(aten.mul.Tensor, x, first), second)
    checked = check_pass(
        FoldConstants(), b.program(out, returned), [[special_values(2, 4)]], "kept"
    )
    folded = [checked.after.weights[name] for name in checked.after.weights if "folded" in name]
    assert [value.tolist() for value in folded] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert all(value.untyped_storage().nbytes() == value.nbytes for value in folded)


def test_several_values_that_one_op_reads_are_folded_with_it(check_pass):
    b = Builder()
    x, w = b.input("x", "batch", 4), b.weight("w", torch.arange(8.0))
    parts = b.call(aten.split.Tensor, w, 4)
    program = b.program(b.call(aten.cat.default, [x, b.call(aten.stack.default, parts)]))
    checked = check_pass(FoldConstants(), program, [[special_values(2, 4)]])
    assert list(checked.after.weights) == ["stack_default_folded"]


def test_fake_weights_and_symbolic_sizes_are_left_alone(check_pass):
    b = Builder()
    x, w = b.input("x", "batch", 4), b.weight("w", torch.ones(4, device="meta"))
    rows = b.call(aten.ones.default, [b.call(aten.sym_size.int, x, 0), 4])
    scaled = b.call(aten.mul.Tensor, w, 2.0)
    program = b.program(b.call(aten.add.Tensor, b.call(aten.mul.Tensor, x, rows), scaled))
    checked = check_pass(FoldConstants(), program, [], "fake")
    assert len(checked.plan.skips) == 1


def test_fills_do_not_depend_on_the_elements_of_their_operand(check_pass):
    b = Builder()
    x = b.input("x", "batch", 4)
    hidden = b.call(aten.exp.default, x)
    yes = b.call(aten.new_ones.default, hidden, [4], dtype=torch.bool)
    row = b.call(aten.select.int, b.call(aten.t.default, b.input("y", 4, 4)), 0, 0)
    zeros = b.call(aten.zeros_like.default, row)
    like = b.call(aten.ones_like.default, x)
    out = b.call(aten.masked_fill.Tensor, x, yes, b.call(aten.sum.default, zeros))
    program = b.program(b.call(aten.add.Tensor, out, like))
    inputs = [[special_values(n, 4), torch.ones(4, 4)] for n in (1, 3)]
    checked = check_pass(FoldConstants(), program, inputs, "fills")
    assert len(checked.plan.actions) == 2
    assert "exp" not in checked.after.text


def test_a_fill_with_a_symbolic_value_is_not_constant(check_pass):
    b = Builder()
    x = b.input("x", "batch", 4)
    filled = b.call(aten.new_full.default, x, [4], b.call(aten.sym_size.int, x, 0))
    program = b.program(b.call(aten.mul.Tensor, x, filled))
    inputs = [[special_values(n, 4)] for n in (1, 3)]
    assert not check_pass(FoldConstants(), program, inputs).plan.actions


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtypes_are_kept(check_pass, dtype):
    b = Builder()
    x, w = b.input("x", 4, dtype=dtype), b.weight("w", torch.ones(4, dtype=torch.int64))
    program = b.program(b.call(aten.mul.Tensor, x, b.call(aten.neg.default, w)))
    checked = check_pass(FoldConstants(), program, [[special_values(4, dtype=dtype)]])
    assert [value.dtype for value in checked.after.weights.values()] == [torch.int64]
