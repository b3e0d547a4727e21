"""`drop_identity_gathers` on graphs made by hand."""

import torch
from building import Builder, aten, special_values

from redpass.passes.drop_identity_gathers import DropIdentityGathers

SIZES = [(1, 1), (2, 5), (4, 3)]


def counter(b, size, *shape):
    made = b.call(aten.arange.default, size)
    for axis in shape:
        made = b.call(aten.unsqueeze.default, made, axis)
    return made


def sizes_of(b, x):
    return [b.call(aten.sym_size.int, x, axis) for axis in range(x.meta["val"].dim())]


def test_a_gather_of_a_whole_mask_is_a_view(check_pass):
    b = Builder()
    x = b.input("x", "batch", "seq")
    rows, columns = sizes_of(b, x)
    indices = [counter(b, rows, 1, 2, 3), counter(b, columns, 0, 0, 0)]
    out = b.call(aten.neg.default, b.call(aten.index.Tensor, x, indices))
    inputs = [[special_values(*size)] for size in SIZES]
    checked = check_pass(DropIdentityGathers(), b.program(out), inputs, "mask")
    assert "arange" not in checked.after.text


def test_other_starts_and_steps_are_no_candidates(check_pass):
    b = Builder()
    x = b.input("x", 6)
    made = [
        b.call(aten.index.Tensor, x, [b.call(aten.arange.start, 2, 6)]),
        b.call(aten.index.Tensor, x, [b.call(aten.arange.start_step, 0, 6, 2)]),
        b.call(aten.index.Tensor, x, [b.input("ids", "batch", dtype=torch.int64)]),
        b.call(aten.index.Tensor, x, [b.call(aten.arange.start_step, 0, 6)]),
    ]
    inputs = [[special_values(6), torch.tensor([5, 0])]]
    checked = check_pass(DropIdentityGathers(), b.program(*made), inputs)
    assert [action.target for action in checked.plan.actions] == ["index_tensor_3"]


def test_gathers_that_do_more_stay(check_pass):
    b = Builder()
    x = b.input("x", "batch", "seq")
    rows, columns = sizes_of(b, x)
    along, down = counter(b, columns, 0), counter(b, rows, 1)
    turned = b.call(aten.t.default, x)
    made = [
        b.call(aten.index.Tensor, x, [down]),
        b.call(aten.index.Tensor, x, [counter(b, 1 + 1, 1), along]),
        b.call(aten.index.Tensor, x, [counter(b, rows, 0), counter(b, columns, 1)]),
        b.call(aten.index.Tensor, turned, [counter(b, columns, 1), counter(b, rows, 0)]),
    ]
    checked = check_pass(DropIdentityGathers(), b.program(*made), [[special_values(4, 3)]], "kept")
    assert not checked.plan.actions
    assert len({skip.reason for skip in checked.plan.skips}) == 4
