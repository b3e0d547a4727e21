"""`drop_noops` on graphs made by hand."""

import pytest
import torch
from building import Builder, aten, special_values
from checking import run_pass

from redpass.passes.drop_noops import DropNoops

ROWS = [1, 2, 7]


def cube(*sizes):
    return [[special_values(n, *sizes)] for n in ROWS]


def test_views_that_end_where_they_began(check_pass):
    b = Builder()
    x = b.input("x", "batch", 4, 6)
    a = b.call(aten.view.default, x, [b.call(aten.sym_size.int, x, 0), 4, 6])
    a = b.call(aten.transpose.int, b.call(aten.transpose.int, a, 1, 2), -1, 1)
    a = b.call(aten.slice.Tensor, a, 1, 0, 9223372036854775807)
    a = b.call(aten.expand.default, a, [-1, 4, 6])
    a = b.call(aten.squeeze.dim, b.call(aten.unsqueeze.default, a, 0), 0)
    a = b.call(aten.permute.default, a, [0, 1, 2])
    checked = check_pass(DropNoops(), b.program(b.call(aten.relu.default, a)), cube(4, 6), "views")
    assert checked.after.text.count("\n") == 2


def test_a_reshape_that_copies_is_not_an_inverse(check_pass):
    b = Builder()
    x = b.input("x", 4, 6)
    turned = b.call(aten.reshape.default, b.call(aten.t.default, x), [4, 6])
    square = b.call(aten.t.default, b.input("y", 5, 5))
    program = b.program(b.call(aten.relu.default, turned), b.call(aten.relu.default, square))
    inputs = [[special_values(4, 6), special_values(5, 5)]]
    assert not check_pass(DropNoops(), program, inputs).plan.actions


def test_a_reshape_to_the_shape_a_turned_value_has(check_pass):
    b = Builder()
    turned = b.call(aten.transpose.int, b.input("x", "batch", 4, 6), 0, 1)
    out = b.call(aten.relu.default, b.call(aten.reshape.default, turned, [4, -1, 6]))
    assert check_pass(DropNoops(), b.program(out), cube(4, 6)).rules == ["drop_noops.view"]


def test_casts_to_the_same_dtype(check_pass):
    b = Builder()
    x, ids = b.input("x", "batch", 4), b.input("ids", "batch", dtype=torch.int64)
    casts = [
        b.call(aten.to.dtype, x, torch.float32),
        b.call(aten._to_copy.default, x, dtype=torch.float32),
        b.call(aten.to.dtype, b.call(aten.to.dtype, ids, torch.int64), torch.int64),
        b.call(aten.to.dtype, x, torch.float64),
        b.call(aten.type_as.default, x, x),
    ]
    program = b.program(*(b.call(aten.neg.default, value) for value in casts))
    inputs = [[special_values(n, 4), torch.arange(n)] for n in ROWS]
    checked = check_pass(DropNoops(), program, inputs, "casts")
    assert checked.after.text.count("= to.dtype(") == 1
    assert "_to_copy" not in checked.after.text


def test_copies_that_no_reader_can_see(check_pass):
    b = Builder()
    x = b.input("x", "batch", 4, 6)
    a = b.call(aten.detach.default, b.call(aten.clone.default, b.call(aten.relu.default, x)))
    turned = b.call(aten.transpose.int, a, 1, 2)
    copy = b.call(aten.contiguous.default, turned)
    out = b.call(aten.reshape.default, copy, [-1, 24])
    checked = check_pass(DropNoops(), b.program(out), cube(4, 6), "copies")
    assert checked.rules == ["drop_noops.copy", "drop_noops.view", "drop_noops.copy"]


@pytest.mark.parametrize(
    "reader",
    [
        lambda b, v: b.call(aten.view.default, v, [-1, 24]),
        lambda b, v: b.call(aten.exp.default, v),
        lambda b, v: b.call(aten.matmul.default, v, b.weight("w", torch.ones(4, 4))),
    ],
)
def test_copies_whose_readers_depend_on_the_order_stay(check_pass, reader):
    b = Builder()
    turned = b.call(aten.transpose.int, b.input("x", "batch", 4, 6), 1, 2)
    copy = b.call(aten.clone.default, turned, memory_format=torch.contiguous_format)
    checked = check_pass(DropNoops(), b.program(reader(b, copy)), cube(4, 6))
    assert not checked.plan.actions
    assert "depends on the order in memory" in checked.plan.skips[0].reason


def test_what_stays_and_why(check_pass):
    b = Builder()
    x = b.input("x", "batch", 4, 6)
    kept = b.call(aten.clone.default, x)
    copy = b.call(aten.contiguous.default, b.call(aten.transpose.int, x, 1, 2))
    wet = b.call(aten.dropout.default, copy, 0.5, True)
    check = b.call(aten._assert_tensor_metadata.default, x, dtype=torch.float32)
    check.kwargs = {"dtype": torch.float64}
    checked = check_pass(DropNoops(), b.program(kept, wet), [], "kept")
    assert len(checked.plan.skips) == 4
    assert not checked.plan.actions


def test_dropout_outside_training_and_checks_that_hold(check_pass):
    b = Builder()
    x = b.input("x", "batch", 4)
    dry = b.call(aten.dropout.default, x, 0.1, False)
    zero = b.call(aten.dropout.default, dry, 0.0, True)
    b.call(aten._assert_tensor_metadata.default, x, dtype=torch.float32)
    b.call(aten._assert_scalar.default, True, "always")
    program = b.program(b.call(aten.relu.default, zero))
    inputs = [[special_values(n, 4)] for n in ROWS]
    checked = check_pass(DropNoops(), program, inputs, "dropout")
    assert len(checked.plan.actions) == 4
    assert checked.after.text.count("\n") == 2


def test_a_squeeze_whose_effect_depends_on_the_size_stays():
    b = Builder()
    x = b.input("x", "batch", 4)
    out = b.call(aten.relu.default, b.call(aten.squeeze.dim, x, 0))
    assert not run_pass(DropNoops(), b.program(out)).plan.actions


def test_a_value_of_other_strides_is_not_the_same_view():
    b = Builder()
    x = b.input("x", 1, 4)
    out = b.call(aten.relu.default, b.call(aten.view.dtype, x, torch.int32))
    assert not run_pass(DropNoops(), b.program(out)).plan.actions
