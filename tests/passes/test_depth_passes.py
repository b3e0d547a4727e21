"""Dropping layers, spans and branches, sharing and re-using layers: graphs, names, reasons."""

from __future__ import annotations

import pytest
import torch
from building import Builder, aten
from checking import Checked, applied, check_golden, describe, plan_pass

from redpass import rewrite
from redpass.analysis import structure
from redpass.data import Batches
from redpass.errors import DataError, UsageError
from redpass.facts import Facts
from redpass.passes.drop_branches import DropBranches
from redpass.passes.drop_layers import DropLayers
from redpass.passes.drop_span import DropSpan
from redpass.passes.reuse_layers import ReuseLayers
from redpass.passes.share_layers import ShareLayers
from redpass.plan import Pass
from redpass.program import Program

STILL = 1
"""The layer whose output weights are zero."""


def tower(depth: int = 3, stream: bool = True, widths: tuple[int, ...] = ()) -> Program:
    """Feed-forward layers on a stream of width 4; layer `STILL` adds nothing."""
    generator = torch.Generator().manual_seed(0)
    b = Builder()
    x = b.input("x", "batch", 4)
    weights = []
    for layer in range(depth):
        inner = widths[layer] if widths else 6
        up = torch.randn(inner, 4, generator=generator)
        down = torch.randn(4, inner, generator=generator) * (layer != STILL)
        pair = (b.weight(f"up{layer}", up), b.weight(f"down{layer}", down))
        weights.append(pair)
    for up_node, down_node in weights:
        hidden = b.call(aten.relu.default, b.call(aten.linear.default, x, up_node))
        made = b.call(aten.linear.default, hidden, down_node)
        x = b.call(aten.add.Tensor, x, made) if stream else made
    return b.program(x)


def shared() -> Program:
    program = tower(2)
    return planned(ShareLayers(only=("layers.1=layers.0",)), program).after


def data(rows: int = 8) -> Batches:
    generator = torch.Generator().manual_seed(1)
    return Batches(tuple({"x": torch.randn(rows, 4, generator=generator)} for _ in range(2)))


def planned(pass_: Pass, program: Program, batches: Batches | None = None) -> Checked:
    plan = plan_pass(pass_, program, batches)
    return Checked(plan, applied(program, *plan.actions))


GOLDEN = {
    "drop_layers/named": (DropLayers(only=("layers.0",)), tower, None),
    "drop_layers/no_stream": (DropLayers(), lambda: tower(stream=False), None),
    "drop_layers/one_layer": (DropLayers(), lambda: tower(1), None),
    "drop_layers/alike": (DropLayers(min_similarity=1.5, only=()), lambda: tower(2), data),
    "share_layers/named": (ShareLayers(only=("layers.2=layers.1",)), tower, None),
    "share_layers/shared": (ShareLayers(only=("layers.1=layers.0",)), lambda: shared(), None),
    "share_layers/no_twins": (ShareLayers(), lambda: tower(2, widths=(6, 5)), data),
    "share_layers/no_stream": (ShareLayers(), lambda: tower(stream=False), None),
    "share_layers/one_layer": (ShareLayers(), lambda: tower(1), None),
    "reuse_layers/named": (ReuseLayers(only=("layers.2=layers.1",)), tower, None),
    "reuse_layers/shared": (ReuseLayers(only=("layers.1=layers.0",)), lambda: shared(), None),
    "reuse_layers/no_twins": (ReuseLayers(), lambda: tower(2, widths=(6, 5)), data),
    "reuse_layers/no_better": (ReuseLayers(), lambda: tower(2), data),
    "reuse_layers/no_stream": (ReuseLayers(), lambda: tower(stream=False), None),
    "reuse_layers/one_layer": (ReuseLayers(), lambda: tower(1), None),
    "drop_span/named": (DropSpan(only=("layers.1-2",)), tower, None),
    "drop_span/no_stream": (DropSpan(), lambda: tower(stream=False), None),
    "drop_span/one_layer": (DropSpan(), lambda: tower(1), None),
    "drop_span/too_long": (DropSpan(lengths=(3,)), tower, data),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_golden(name, request):
    pass_, build, batches = GOLDEN[name]
    program = build()
    checked = planned(pass_, program, batches() if batches else None)
    check_golden(name, describe(program, checked), request.config.getoption("--update-golden"))


def test_dropping_the_layer_that_adds_nothing_changes_no_bit():
    program = tower()
    after = planned(DropLayers(only=(f"layers.{STILL}",)), program).after
    x = torch.randn(5, 4)
    assert torch.equal(after(x)[0], program(x)[0])
    assert len(after.weights) == 4


def test_layers_come_in_the_order_of_their_influence():
    plan = planned(DropLayers(), tower(), data()).plan
    assert plan.actions[0].target == f"layers.{STILL}"
    assert plan.actions[0].loss == pytest.approx(0.0, abs=1e-9)
    losses = [action.loss for action in plan.actions]
    assert losses == sorted(losses)
    assert losses[1] > 0.01


def test_savings_are_what_the_program_no_longer_costs():
    from redpass.analysis.cost import total_cost

    program = tower()
    for pass_ in (DropLayers(only=("layers.2",)), DropSpan(only=("layers.0-1",))):
        checked = planned(pass_, program)
        lost = total_cost(program).parameters - total_cost(checked.after).parameters
        assert checked.plan.actions[0].saving["parameters"] == lost


def test_a_span_is_its_layers():
    program = tower(4)
    span = planned(DropSpan(only=("layers.1-2",)), program).after
    layers = planned(DropLayers(only=("layers.1", "layers.2")), program).after
    assert span.text == layers.text


def test_what_overlaps_is_dropped_once():
    program = tower(4)
    facts = Facts(program)
    span = DropSpan(only=("layers.1-2",)).plan(program, facts).actions
    layer = DropLayers(only=("layers.2",)).plan(program, facts).actions
    branch = DropBranches(only=("layers.2.feed-forward",)).plan(program, facts).actions
    expected = rewrite.apply(program, span)
    overlapping = DropSpan(only=("layers.2-3",)).plan(program, facts).actions
    whole = DropSpan(only=("layers.1-3",)).plan(program, facts).actions
    for actions in ((*span, *overlapping), (*overlapping, *span)):
        assert rewrite.apply(program, actions).text == rewrite.apply(program, whole).text
    for actions in ((*span, *layer), (*layer, *span), (*branch, *span), (*branch, *layer, *span)):
        assert rewrite.apply(program, actions).text == expected.text


@pytest.mark.parametrize(
    ("pass_", "message"),
    [
        (DropLayers(only=("layers.7",)), "no layer is called 'layers.7'"),
        (DropLayers(only=("layers.0", "layers.1", "layers.2")), "all 3 layers"),
        (DropLayers(count=3), "3 of 3 layers cannot be dropped"),
        (ShareLayers(only=("layers.2=layers.0",)), "no pair of layers 'layers.2=layers.0'"),
        (DropSpan(only=("layers.1-9",)), "no layer is called 'layers.1-9'"),
        (DropSpan(lengths=(1,)), "a span of 1 layers"),
        (DropBranches(only=("layers.9.feed-forward",)), "no branch is called"),
    ],
)
def test_more_than_there_is_cannot_be_asked_away(pass_, message):
    with pytest.raises(UsageError, match=message):
        planned(pass_, tower(), data())


def test_a_layer_whose_values_are_not_finite_is_named():
    program = tower()
    broken = dict(program.weights)
    broken["down2"] = torch.full_like(broken["down2"], float("nan"))
    program = Program(program.graph, broken, program.signature, program.origin)
    assert structure(program).branches
    for pass_ in (DropLayers(), DropSpan(), DropBranches(), ShareLayers(), ReuseLayers()):
        with pytest.raises(DataError, match=r"layers\.2.*NaN or infinite"):
            planned(pass_, program, data())


def alike() -> Program:
    """Three layers, the last the same as the one before with its inner units in another order."""
    program = tower(3)
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    weights = dict(program.weights)
    weights["down1"] = torch.randn(4, 6, generator=torch.Generator().manual_seed(5))
    weights |= {"up2": weights["up1"][order], "down2": weights["down1"][:, order]}
    return Program(program.graph, weights, program.signature, program.origin)


def test_layers_are_alike_when_they_do_alike_whatever_their_weights_look_like():
    program = alike()
    plan = planned(ShareLayers(), program, data()).plan
    first = [action.target for action in plan.actions[:2]]
    assert sorted(first) == ["layers.1=layers.2", "layers.2=layers.1"]
    assert plan.actions[1].loss == pytest.approx(0.0, abs=1e-6)
    assert plan.actions[2].loss > 0.01
    after = rewrite.apply(program, plan.actions[:1])
    x = torch.randn(5, 4)
    torch.testing.assert_close(after(x)[0], program(x)[0])
    assert len(after.weights) == 4
    assert plan.actions[0].saving == {"parameters": 48, "bytes": 192}


def test_sharing_saves_bytes_and_no_work():
    from redpass.analysis.cost import total_cost

    program = alike()
    after = planned(ShareLayers(only=("layers.2=layers.1",)), program).after
    before, now = total_cost(program), total_cost(after)
    assert (now.bytes, now.flops({"batch": 3})) == (before.bytes - 192, before.flops({"batch": 3}))


def test_a_neighbour_runs_again_only_where_dropping_is_worse():
    plan = planned(ReuseLayers(), alike(), data()).plan
    assert {"layers.1=layers.2", "layers.2=layers.1"} <= {a.target for a in plan.actions}
    assert all(a.evidence["effect"] < a.evidence["dropped"] for a in plan.actions)


def test_the_neighbour_may_be_dropped_after_its_weights_were_lent():
    program = alike()
    facts = Facts(program)
    lend = ShareLayers(only=("layers.2=layers.1",)).plan(program, facts).actions
    drop = DropLayers(only=("layers.1",)).plan(program, facts).actions
    x = torch.randn(5, 4)
    expected = planned(DropLayers(only=("layers.1",)), program).after(x)[0]
    for actions in ((*lend, *drop), (*drop, *lend)):
        after = rewrite.apply(program, actions)
        torch.testing.assert_close(after(x)[0], expected)
        assert set(after.weights) == {"up0", "down0", "up1", "down1"}
