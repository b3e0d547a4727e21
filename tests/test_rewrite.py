"""Edits: what each does to a graph, and that the program it came from stays as it was."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import redpass
from redpass import rewrite
from redpass.errors import PassError
from redpass.plan import Action, DropTerm, Insert, Ref, Replace, SetArgument, SetWeight, WeightRef


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)
        self.b = nn.Linear(4, 4)

    def forward(self, x):
        return torch.relu(self.a(x)) + self.b(x)


@pytest.fixture(scope="module")
def two():
    torch.manual_seed(0)
    return redpass.load(Two().eval(), example={"x": torch.randn(2, 4)}, inputs=["x:float32[n,4]"])


def act(*edits):
    return Action("test.rule", "here", edits, "for the test")


def test_replacing_a_value_removes_what_becomes_dead(two):
    after = rewrite.apply(two, [act(Replace("relu", "linear_1"))])
    assert set(after.weights) == {"b.weight", "b.bias"}
    x = torch.randn(3, 4)
    assert torch.equal(after(x)[0], 2 * torch.nn.functional.linear(x, *after.weights.values()))


def test_the_program_before_is_untouched_and_weights_are_shared(two):
    text = two.text
    after = rewrite.apply(two, [act(Replace("relu", "linear_1"))])
    assert two.text == text
    assert after.weights["b.weight"] is two.weights["b.weight"]


def test_actions_follow_values_that_earlier_ones_replaced(two):
    negate = Insert("flip", torch.ops.aten.neg.default, (Ref("relu"),), before="add")
    actions = [act(Replace("relu", "linear")), act(negate, SetArgument("add", "relu", "flip"))]
    x = torch.randn(3, 4)
    after = rewrite.apply(two, actions)
    a, b = (
        torch.nn.functional.linear(x, two.weights[f"{n}.weight"], two.weights[f"{n}.bias"])
        for n in "ab"
    )
    torch.testing.assert_close(after(x)[0], b - a, rtol=1e-6, atol=1e-6)


def test_a_new_value_may_be_computed_from_the_one_it_replaces(two):
    twice = Insert("twice", torch.ops.aten.mul.Tensor, (Ref("relu"), 2.0), before="add")
    after = rewrite.apply(two, [act(twice, Replace("relu", "twice"))])
    assert "%twice:f32[" in after.text
    assert "mul.Tensor(%relu, 2.0)" in after.text


def test_new_weights_get_a_node_and_a_fake_value(two):
    weight = SetWeight("a.weight.new", torch.zeros(4, 4), "zeros")
    linear = torch.ops.aten.linear.default
    new = Insert("fresh", linear, (Ref("x"), WeightRef("a.weight.new")), before="relu")
    after = rewrite.apply(two, [act(weight, new, Replace("linear", "fresh"))])
    assert "weight a.weight.new" in after.text
    assert "a.bias" not in after.weights
    assert after.nodes["fresh"].meta["val"].shape[1] == 4


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (Replace("nothing", "relu"), "nothing: an edit names a node"),
        (Replace("relu", WeightRef("none")), "none: an edit names a weight"),
        (SetWeight("a.weight", torch.zeros(1)), "a.weight: a new weight would hide"),
        (Insert("bad", torch.ops.aten.mm.default, (Ref("relu"), 3), before="add"), "Insert failed"),
    ],
)
def test_edits_that_cannot_be_done_name_the_place(two, edit, message):
    with pytest.raises(PassError, match=message):
        rewrite.apply(two, [act(edit)])


class Parallel(nn.Module):
    """Two branches on one stream: their sum first, or one after the other onto the stream."""

    def __init__(self, nested: bool) -> None:
        super().__init__()
        self.nested = nested
        self.a, self.b, self.last = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, x):
        a, b = torch.relu(self.a(x)), torch.relu(self.b(x))
        return self.last(x + (a + b) if self.nested else x + a + b)


@pytest.fixture(scope="module", params=[False, True], ids=["in a row", "summed first"])
def parallel(request):
    torch.manual_seed(0)
    module = Parallel(request.param).eval()
    return redpass.load(module, example={"x": torch.randn(2, 4)}, inputs=["x:float32[n,4]"])


@pytest.mark.parametrize("order", [(0,), (1,), (0, 1), (1, 0)])
def test_terms_of_one_sum_are_dropped_in_any_order(parallel, order):
    branches = redpass.structure(parallel).branches
    assert len(branches) == 2
    gone = [branches[number] for number in order]
    after = rewrite.apply(parallel, [act(DropTerm(b.join, b.exit)) for b in gone])
    x = torch.randn(3, 4)
    left = [b for b in branches if b not in gone]
    expected = x
    for branch in left:
        weight, bias = (parallel.weights[name] for name in sorted(branch.weights)[::-1])
        expected = expected + torch.relu(torch.nn.functional.linear(x, weight, bias))
    last = [parallel.weights[f"last.{name}"] for name in ("weight", "bias")]
    torch.testing.assert_close(after(x)[0], torch.nn.functional.linear(expected, *last))
    assert len(after.weights) == 2 + 2 * len(left)


def test_a_term_is_found_behind_what_changes_nothing():
    class Dropped(Two):
        def forward(self, x):
            return torch.relu(self.a(x)) + nn.functional.dropout(self.b(x), 0.1, self.training)

    program = redpass.load(
        Dropped().eval(), example={"x": torch.randn(2, 4)}, inputs=["x:float32[n,4]"]
    )
    assert "dropout" in program.nodes
    after = rewrite.apply(program, [act(DropTerm("add", "linear_1"))])
    assert set(after.weights) == {"a.weight", "a.bias"}


def test_a_term_that_is_not_in_the_sum_is_refused(two):
    with pytest.raises(PassError, match="no single term of the sum"):
        rewrite.apply(two, [act(DropTerm("add", "linear"))])


def test_a_sum_that_nothing_is_left_of_is_refused(two):
    edits = (DropTerm("add", "relu"), DropTerm("add", "linear_1"))
    with pytest.raises(PassError, match="output: nothing is left"):
        rewrite.apply(two, [act(*edits)])
