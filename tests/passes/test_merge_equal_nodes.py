"""`merge_equal_nodes` on graphs made by hand, and on a module that computes tables per layer."""

import pytest
from building import Builder, aten, special_values
from checking import run_pass

from redpass.passes.merge_equal_nodes import MergeEqualNodes


def unary(b, x):
    return b.call(aten.neg.default, b.call(aten.relu.default, x))


def test_a_chain_that_is_computed_twice_is_one_action(check_pass):
    b = Builder()
    x = b.input("x", "batch", 4)
    program = b.program(b.call(aten.mul.Tensor, unary(b, x), unary(b, x)))
    checked = check_pass(
        MergeEqualNodes(), program, [[special_values(n, 4)] for n in (1, 5)], "chain"
    )
    assert len(checked.plan.actions) == 1
    assert checked.after.text.count("= relu(") == 1


def test_operands_of_commutative_ops_stand_in_either_order(check_pass):
    b = Builder()
    x, y = b.input("x", "batch", 4), b.input("y", "batch", 4)
    first, second = b.call(aten.add.Tensor, x, y), b.call(aten.add.Tensor, y, x)
    program = b.program(b.call(aten.sub.Tensor, first, second))
    inputs = [[special_values(n, 4), special_values(n, 4, seed=1)] for n in (1, 5)]
    assert check_pass(MergeEqualNodes(), program, inputs, "commutative").plan.actions


@pytest.mark.parametrize(
    "calls",
    [
        ((aten.sub.Tensor, "x", "y"), (aten.sub.Tensor, "y", "x")),
        ((aten.maximum.default, "x", "y"), (aten.maximum.default, "y", "x")),
        ((aten.mul.Tensor, "x", 1), (aten.mul.Tensor, "x", True)),
        ((aten.mul.Tensor, "x", 0.0), (aten.mul.Tensor, "x", -0.0)),
        ((aten.sum.dim_IntList, "x", [0]), (aten.sum.dim_IntList, "x", [1])),
    ],
)
def test_what_only_looks_equal_is_left_alone(calls):
    b = Builder()
    values = {"x": b.input("x", 4, 4), "y": b.input("y", 4, 4)}
    made = [
        b.call(t, *(values.get(a, a) if isinstance(a, str) else a for a in args))
        for t, *args in calls
    ]
    checked = run_pass(MergeEqualNodes(), b.program(*made))
    assert not checked.plan.actions
    assert not checked.plan.skips


def test_defaults_may_be_written_out(check_pass):
    b = Builder()
    x = b.input("x", "batch", 4)
    first = b.call(aten.add.Tensor, x, x)
    second = b.call(aten.add.Tensor, x, x, alpha=1)
    program = b.program(b.call(aten.sub.Tensor, first, second))
    assert check_pass(MergeEqualNodes(), program, [[special_values(2, 4)]]).plan.actions


def test_random_unknown_and_differently_laid_out_values_stay(check_pass):
    b = Builder()
    x = b.input("x", "batch", "seq")
    y = b.call(aten.t.default, b.input("y", "seq", "batch"))
    drops = [b.call(aten.dropout.default, x, 0.5, True) for _ in range(2)]
    sums = [b.call(aten.add.Tensor, x, y), b.call(aten.add.Tensor, y, x)]
    checks = [b.call(aten._assert_tensor_metadata.default, x) for _ in range(2)]
    checked = check_pass(MergeEqualNodes(), b.program(*drops, *sums), [], "kept")
    assert len(checked.plan.skips) == len([*drops, *sums, *checks]) / 2


def test_one_layer_may_be_the_only_reader_of_what_merges(check_pass):
    b = Builder()
    x = b.input("x", "batch", 4)
    twice = [unary(b, x) for _ in range(3)]
    outputs = [b.call(aten.exp.default, value) for value in twice]
    program = b.program(*outputs)
    checked = check_pass(MergeEqualNodes(), program, [[special_values(2, 4)]], "outputs")
    assert checked.after.text.count("= exp(") == 1
    assert [action.target for action in checked.plan.actions] == ["exp_default_1", "exp_default_2"]
