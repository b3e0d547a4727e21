"""Edits: what each does to a graph, and that the program it came from stays as it was."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import fx, nn

import redpass
from redpass import rewrite
from redpass.errors import PassError
from redpass.plan import (
    Action,
    DropTerm,
    Insert,
    Ref,
    Replace,
    ResizeState,
    SetArgument,
    SetCall,
    SetWeight,
    WeightRef,
)
from redpass.verify.rules import check_rules


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


class Cached(nn.Module):
    """Two heads of three channels over a cache, then an output projection."""

    def __init__(self) -> None:
        super().__init__()
        self.inside = nn.Linear(4, 6, bias=False)
        self.outside = nn.Linear(6, 4, bias=False)

    def forward(self, x, past):
        new = self.inside(x).view(x.shape[0], x.shape[1], 2, 3).transpose(1, 2)
        whole = torch.cat([past, new], dim=2)
        return self.outside(whole.transpose(1, 2).reshape(x.shape[0], -1, 6)), whole


@pytest.fixture(scope="module")
def cached():
    torch.manual_seed(0)
    example = {"x": torch.randn(2, 5, 4), "past": torch.randn(2, 2, 7, 3)}
    inputs = ["x:float32[batch,seq,4]", "past:float32[batch,2,past,3]"]
    program = redpass.load(Cached().eval(), example=example, inputs=inputs)
    state = (("past", program.signature.outputs[1].name),)
    return replace(program, signature=replace(program.signature, state=state))


def first_head(program):
    """The edits that leave the first of the two heads, cache and all."""
    (_, output), reader = program.signature.state[0], {}
    for node in program.graph.nodes:
        reader.setdefault(node.name.rpartition("_")[0] or node.name, node)
    views = [n for n in program.graph.nodes if "view" in n.name or "reshape" in n.name]
    split, merge = views
    lead = [Ref(a.name) if isinstance(a, fx.Node) else a for a in split.args[1][:2]]
    rest = [Ref(a.name) if isinstance(a, fx.Node) else a for a in merge.args[1][:-1]]
    weights = {str(n.target): n for n in program.weight_nodes}
    inside, outside = weights["inside.weight"], weights["outside.weight"]
    return (
        SetWeight("inside_kept", program.weights["inside.weight"][:3]),
        SetWeight("outside_kept", program.weights["outside.weight"][:, :3].contiguous()),
        SetArgument(next(iter(inside.users)).name, inside.name, WeightRef("inside_kept")),
        SetArgument(next(iter(outside.users)).name, outside.name, WeightRef("outside_kept")),
        SetCall(split.name, (Ref(split.args[0].name), [*lead, 1, 3])),
        SetCall(merge.name, (Ref(merge.args[0].name), [*rest, 3])),
        ResizeState("past", output, 1, 1),
    )


def test_heads_are_cut_in_place_and_sizes_follow(cached):
    after = rewrite.apply(cached, [act(*first_head(cached))])
    check_rules(after, paranoid=True)
    assert after.signature.input("past").shape[1] == 1
    assert after.signature.outputs[1].shape[1] == 1
    assert cached.signature.input("past").shape[1] == 2  # the one it came from is as it was
    x, past = torch.randn(2, 3, 4), torch.randn(2, 2, 6, 3)
    zeroed = cached.weights["outside.weight"].clone()
    zeroed[:, 3:] = 0
    control = replace(cached, weights={**cached.weights, "outside.weight": zeroed})
    wanted, got = control(x, past), after(x, past[:, :1])
    torch.testing.assert_close(got[0], wanted[0])
    torch.testing.assert_close(got[1], wanted[1][:, :1])


def test_sizes_that_do_not_fit_are_refused_at_the_node(cached):
    edits = [edit for edit in first_head(cached) if not isinstance(edit, ResizeState)]
    with pytest.raises(PassError, match="the new sizes do not fit") as caught:
        rewrite.apply(cached, [act(*edits)])
    assert caught.value.place == "cat"


def test_a_node_inserted_while_sizes_change_gets_its_value_at_the_end(cached):
    view = next(n for n in cached.graph.nodes if "view" in n.name)
    reader = next(iter(view.users))
    turned = Insert("turned", torch.ops.aten.neg.default, (Ref(view.name),), reader.name)
    after = rewrite.apply(
        cached, [act(*first_head(cached), turned, SetArgument(reader.name, view.name, "turned"))]
    )
    check_rules(after, paranoid=True)
    assert after.nodes["turned"].meta["val"].shape[2] == 1


class Flattened(nn.Module):
    """A view that holds for the order in memory that is there, and for no other."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.permute(0, 1, 2).relu().permute(0, 1, 2).view(-1, 64) + 1


def test_a_view_of_values_that_now_lie_in_another_order_copies():
    program = redpass.load(
        Flattened(), example={"x": torch.randn(2, 8, 8)}, inputs=["x:float32[batch,8,8]"]
    )
    moved = next(n for n in program.graph.nodes if "permute" in n.name and "relu" in str(n.args))
    after = rewrite.apply(program, [act(SetCall(moved.name, (Ref(moved.args[0].name), [0, 2, 1])))])
    check_rules(after, paranoid=True)
    x = torch.randn(3, 8, 8)
    torch.testing.assert_close(after(x)[0], x.mT.relu().reshape(-1, 64) + 1)
