"""Dropping layers, spans and branches, sharing and re-using layers: graphs, names, reasons."""

from __future__ import annotations

import pytest
import torch
from building import Builder, aten
from checking import Checked, check_golden, describe

from redpass import rewrite
from redpass.analysis import structure
from redpass.data import Batches
from redpass.errors import DataError, UsageError
from redpass.facts import Facts
from redpass.passes.drop_branches import DropBranches
from redpass.passes.drop_layers import DropLayers
from redpass.passes.drop_span import DropSpan
from redpass.plan import Pass
from redpass.program import Program
from redpass.verify.rules import check_rules

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


def data(rows: int = 8) -> Batches:
    generator = torch.Generator().manual_seed(1)
    return Batches(tuple({"x": torch.randn(rows, 4, generator=generator)} for _ in range(2)))


def planned(pass_: Pass, program: Program, batches: Batches | None = None) -> Checked:
    facts = Facts(program, batches).restrict(tuple(pass_.needs))
    plan = pass_.plan(program, facts)
    after = rewrite.apply(program, plan.actions)
    check_rules(after)
    return Checked(plan, after)


GOLDEN = {
    "drop_layers/named": (DropLayers(only=("layers.0",)), tower, None),
    "drop_layers/no_stream": (DropLayers(), lambda: tower(stream=False), None),
    "drop_layers/one_layer": (DropLayers(), lambda: tower(1), None),
    "drop_layers/alike": (DropLayers(min_similarity=1.5, only=()), lambda: tower(2), data),
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
    for pass_ in (DropLayers(), DropSpan(), DropBranches()):
        with pytest.raises(DataError, match=r"layers\.2.*NaN or infinite"):
            planned(pass_, program, data())
