"""`drop_dead_nodes` on graphs made by hand."""

import torch
from building import Builder, aten, special_values

from redpass.passes.drop_dead_nodes import DropDeadNodes


def test_a_dead_chain_is_one_action_and_takes_its_weight_along(check_pass):
    b = Builder()
    x, w = b.input("x", "batch", 4), b.weight("w", torch.ones(4))
    live = b.call(aten.relu.default, x)
    b.call(aten.neg.default, b.call(aten.mul.Tensor, x, w))
    checked = check_pass(
        DropDeadNodes(), b.program(live), [[special_values(2, 4)], [special_values(7, 4)]], "chain"
    )
    (action,) = checked.plan.actions
    assert action.evidence == {"nodes": 3}
    assert action.saving == {"parameters": 4, "bytes": 16}
    assert "w" not in checked.after.weights


def test_what_two_dead_values_share_is_dropped_and_counted_once(check_pass):
    b = Builder()
    x = b.input("x", "batch", 4)
    shared = b.call(aten.relu.default, x)
    b.call(aten.neg.default, shared)
    b.call(aten.abs.default, shared)
    plan = check_pass(DropDeadNodes(), b.program(x), [[special_values(2, 4)]], "shared").plan
    assert sum(action.evidence["nodes"] for action in plan.actions) == 3


def test_inputs_and_random_values_stay(check_pass):
    b = Builder()
    x, _unread = b.input("x", "batch", 4), b.input("unread", "batch")
    b.call(aten.dropout.default, x, 0.5, True)
    program = b.program(x)
    checked = check_pass(DropDeadNodes(), program, [[special_values(2, 4), torch.zeros(2)]], "kept")
    assert len(checked.plan.skips) == 2
    assert checked.after is program


def test_a_graph_without_dead_values_plans_nothing(check_pass):
    b = Builder()
    x = b.input("x", "batch", 4)
    plan = check_pass(DropDeadNodes(), b.program(b.call(aten.relu.default, x)), []).plan
    assert not plan.actions
    assert not plan.skips
