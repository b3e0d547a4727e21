"""`merge_equal_sizes` on graphs made by hand."""

import operator

import torch
from building import Builder, aten, special_values

from redpass.passes.merge_equal_sizes import MergeEqualSizes

SIZES = [(1, 1), (2, 7), (5, 3)]


def two_reads(b, x, y):
    first = b.call(aten.view.default, x, [b.call(aten.sym_size.int, x, 0), -1])
    second = b.call(aten.view.default, y, [b.call(aten.sym_size.int, y, 0), -1])
    return b.call(aten.add.Tensor, first, second)


def test_sizes_of_hidden_values_are_read_off_the_input(check_pass):
    b = Builder()
    x = b.input("x", "batch", "seq", 4)
    hidden, other = b.call(aten.relu.default, x), b.call(aten.neg.default, x)
    program = b.program(two_reads(b, hidden, other))
    inputs = [[special_values(*size, 4)] for size in SIZES]
    checked = check_pass(MergeEqualSizes(), program, inputs, "hidden")
    assert checked.rules == ["merge_equal_sizes.input"]
    assert checked.after.text.count("sym_size") == 1


def test_inputs_that_are_not_state_are_preferred(check_pass):
    b = Builder()
    cache, x = b.input("cache", "batch", 8), b.input("x", "batch", 8)
    out = two_reads(b, cache, x)
    kept = b.call(aten.relu.default, cache)
    program = b.program(out, kept, state=(("cache", "present"),))
    inputs = [[special_values(n, 8), special_values(n, 8, seed=1)] for n in (1, 4)]
    checked = check_pass(MergeEqualSizes(), program, inputs, "state")
    assert "sym_size.int(%x, 0)" in checked.after.text
    assert "sym_size.int(%cache" not in checked.after.text


def test_a_sum_that_an_input_has_as_size_is_read_there(check_pass):
    b = Builder()
    mask, x, y = b.input("mask", "past + seq"), b.input("x", "seq"), b.input("y", "past")
    total = b.call(operator.add, b.call(aten.sym_size.int, y, 0), b.call(aten.sym_size.int, x, 0))
    joined = b.call(aten.cat.default, [y, x])
    out = b.call(aten.mul.Tensor, b.call(aten.view.default, joined, [total, 1]), mask)
    inputs = [[special_values(n + m), torch.ones(n), torch.ones(m)] for n, m in SIZES]
    checked = check_pass(MergeEqualSizes(), b.program(out), inputs, "sum")
    assert checked.rules == ["merge_equal_sizes.input"]
    assert "operator.add" not in checked.after.text


def test_equal_sums_that_no_input_has_are_computed_once(check_pass):
    b = Builder()
    x, y = b.input("x", "seq"), b.input("y", "past")
    joined = b.call(aten.cat.default, [y, x])
    total = b.call(operator.add, b.call(aten.sym_size.int, y, 0), b.call(aten.sym_size.int, x, 0))
    again = b.call(aten.sym_size.int, joined, 0)
    out = b.call(aten.view.default, b.call(aten.view.default, joined, [total, 1]), [1, again])
    inputs = [[special_values(n), torch.ones(m)] for n, m in SIZES]
    checked = check_pass(MergeEqualSizes(), b.program(out), inputs, "no_input")
    assert checked.rules == ["merge_equal_sizes.same"]


def test_constant_sizes_become_literals(check_pass):
    b = Builder()
    x = b.input("x", "batch", 4, 2)
    size = b.call(aten.sym_size.int, x, 1)
    out = b.call(aten.view.default, x, [-1, b.call(operator.mul, size, 2)])
    checked = check_pass(MergeEqualSizes(), b.program(out), [[special_values(3, 4, 2)]], "constant")
    assert "view(%x, [-1, 8])" in checked.after.text


def test_an_input_that_comes_after_the_first_use_is_not_read(check_pass):
    b = Builder()
    flat = b.call(aten.view.default, b.input("x", "batch", 4), [-1])
    out = b.call(aten.view.default, flat, [b.call(aten.sym_size.int, flat, 0), 1])
    late = b.input("late", "4 * batch")
    program = b.program(b.call(aten.mul.Tensor, out, late))
    inputs = [[special_values(n, 4), torch.ones(4 * n)] for n in (1, 4)]
    checked = check_pass(MergeEqualSizes(), program, inputs, "late")
    assert [skip.rule for skip in checked.plan.skips] == ["merge_equal_sizes.same"]


def test_one_size_read_off_an_input_is_left_as_it_is(check_pass):
    b = Builder()
    x = b.input("x", "batch", 4)
    out = b.call(aten.view.default, x, [b.call(aten.sym_size.int, x, 0), 2, 2])
    assert not check_pass(MergeEqualSizes(), b.program(out), [[torch.ones(3, 4)]]).plan.actions
