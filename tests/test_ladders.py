"""Ladders in a whole run: rivals, goals, replay, and cuts given back that make nothing faster."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch

import redpass
from redpass import bench
from redpass.bench import BenchTable
from redpass.errors import BudgetError, UsageError
from redpass.passes import PASSES
from redpass.passes.drop_branches import DropBranches
from redpass.passes.prune_channels import PruneChannels
from redpass.recipe import needs_data, replay
from redpass.record import LatencyRecord

CUT = PruneChannels(shares=(0.75, 0.5, 0.25), multiple=1)
LOOSE, TIGHT = "relative_error<=0.6", "relative_error<=0.1"


def applied(result: redpass.Result) -> list[str]:
    return [a.key for a in result.record.actions if a.outcome == "applied"]


def places(result: redpass.Result) -> list[str]:
    return [key.rpartition("@")[0] for key in applied(result)]


@pytest.fixture(scope="module", params=["greedy", "allocated", "one-shot"])
def cut(request, residual, residual_data):
    return redpass.optimize(residual, [CUT], budget=LOOSE, data=residual_data, search=request.param)


def test_at_most_one_rung_of_a_ladder_is_taken(cut):
    assert places(cut)
    assert len(places(cut)) == len(set(places(cut)))
    assert cut.record.verdict == "met"
    assert cut.record.after.parameters < cut.record.before.parameters
    count = sum(record.applied for record in cut.record.passes)
    assert count == len(applied(cut))


def test_a_run_with_ladders_replays_with_its_data(cut, residual, residual_data):
    assert needs_data(cut.record.recipe)
    again = replay(residual, cut.record.recipe, data=residual_data.calibration)
    x = torch.randn(2, 3, 8)
    assert torch.equal(again(x)[0], cut.program(x)[0])


def test_widths_and_branches_are_one_pool(residual, residual_data):
    result = redpass.optimize(
        residual,
        [CUT, DropBranches()],
        budget=f"{LOOSE},parameters<=-30%",
        data=residual_data,
        search="allocated",
    )
    assert result.record.after.parameters <= 0.7 * result.record.before.parameters
    assert len(result.record.recipe.passes) == 1


def test_every_pass_that_fits_weights_says_that_its_recipe_needs_data():
    silent = [
        name
        for name, kind in PASSES.items()
        if {"refit", "shares"} & {option.name for option in fields(kind)}
        and not getattr(kind, "fits", False)
    ]
    assert silent == []


def timed(ratio: float, calls: list[int], low: float = 0.0):
    def compare(before, after, *, runners, rounds):
        del before, after, rounds
        calls.append(1)
        spread = (low or ratio, ratio)
        return BenchTable((LatencyRecord(runners[0], "", 1.0, ratio, ratio, spread),), {})

    return compare


@pytest.mark.parametrize(
    ("ratio", "low", "stays"), [(0.9, 0.9, True), (1.02, 1.01, False), (1.16, 0.98, True)]
)
def test_cuts_stay_only_where_the_model_is_faster(
    residual, residual_data, monkeypatch, ratio, low, stays
):
    calls: list[int] = []
    monkeypatch.setattr(bench, "compare", timed(ratio, calls, low))
    result = redpass.optimize(
        residual, [CUT, DropBranches()], budget=TIGHT, data=residual_data, only_faster=True
    )
    kinds = {key.partition(".")[0] for key in applied(result)}
    assert "drop_branches" in kinds
    assert ("prune_channels" in kinds) == stays
    assert len(calls) == 1
    if not stays:
        reasons = {a.why for a in result.record.actions if a.pass_name == "prune_channels"}
        assert any("no faster with the cuts of prune_channels: 1.020" in why for why in reasons)


def test_what_cuts_kept_out_is_taken_when_they_are_given_back(monkeypatch, residual, residual_data):
    monkeypatch.setattr(bench, "compare", timed(1.1, []))
    words = {"budget": TIGHT, "data": residual_data, "only_faster": True}
    both = redpass.optimize(residual, [CUT, DropBranches()], **words)
    alone = redpass.optimize(residual, [DropBranches()], **words)
    assert {a.pass_name for a in both.record.actions if "no faster" in a.why} == {"prune_channels"}
    assert applied(both) == applied(alone)
    assert both.record.after.flops == alone.record.after.flops


@pytest.mark.parametrize("goal", ["parameters<=-1%", "flops<=-40%"])
def test_cuts_that_a_goal_needs_are_not_given_back(residual, residual_data, monkeypatch, goal):
    calls: list[int] = []
    monkeypatch.setattr(bench, "compare", timed(2.0, calls))
    result = redpass.optimize(
        residual, [CUT], budget=f"{LOOSE},{goal}", data=residual_data, only_faster=True
    )
    assert applied(result)
    assert calls == []


def test_reducing_passes_run_between_the_exact_ones(residual, residual_data):
    result = redpass.optimize(
        residual, reduce="prune_channels(multiple=1)", budget=LOOSE, data=residual_data
    )
    names = [record.name for record in result.record.passes]
    place = names.index("prune_channels")
    assert names.index("fold_constants") < place < names.index("merge_linears")
    assert "drop_branches" not in names
    assert applied(result)


def test_reducing_passes_that_make_no_sense_are_refused(residual, residual_data):
    for wrong in ({"reduce": "fold_constants"}, {"reduce": "drop_layers", "passes": "drop_layers"}):
        with pytest.raises(UsageError) as caught:
            redpass.optimize(residual, budget=LOOSE, data=residual_data, **wrong)
        assert caught.value.place == "--reduce"
    with pytest.raises(BudgetError, match="needs a quality budget"):
        redpass.optimize(residual, reduce="drop_layers", data=residual_data)
