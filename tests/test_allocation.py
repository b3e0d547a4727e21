"""Allocation: rungs of many ladders in the best order, scaled by trials, taken at once."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

import redpass
from redpass.budget.allocation import CLIP, allocated, measure_ladders
from redpass.budget.candidates import Candidate
from redpass.passes.drop_branches import DropBranches
from redpass.plan import Action

PASS = DropBranches()


def rung(place: str, saving: float, loss: float, name: str = "") -> Candidate:
    target = name or f"{place}@{saving}"
    return Candidate(PASS, Action("r", target, (), "", {}, {"flops": saving}, loss, place))


def worth(action: Action) -> float:
    return action.saving["flops"]


def spent(order, count):
    """Total loss and saving of the first `count` candidates, rivals replaced."""
    last = {c.action.place: c.action for c in order[:count]}
    saved = round(sum(a.saving["flops"] for a in last.values()), 9)
    return sum(a.loss or 0.0 for a in last.values()), saved


LADDER = st.lists(st.tuples(st.integers(1, 9), st.integers(0, 50)), min_size=1, max_size=3)


@given(st.lists(LADDER, min_size=1, max_size=3))
def test_every_prefix_is_the_best_choice_of_what_it_saves(drawn):
    pools = [
        [
            rung(str(n), float(saving), float(loss), f"{n}-{i}")
            for i, (saving, loss) in enumerate(ladder)
        ]
        for n, ladder in enumerate(drawn)
    ]
    order = allocated([c for pool in pools for c in pool], worth)
    choices = list(itertools.product(*[[None, *pool] for pool in pools]))
    for count in range(1, len(order) + 1):
        loss, saved = spent(order, count)
        rivals = [
            sum(c.action.loss for c in choice if c)
            for choice in choices
            if sum(worth(c.action) for c in choice if c) >= saved
        ]
        assert loss <= min(rivals) + 1e-9


def test_rungs_above_the_hull_are_left_out():
    pool = [rung("a", 1, 5.0), rung("a", 2, 2.0), rung("a", 3, 9.0), rung("b", 1, 1.5)]
    assert [c.action.target for c in allocated(pool, worth)] == ["a@2", "b@1", "a@3"]


def test_a_trial_scales_its_ladder_within_bounds():
    pool = [rung(place, 1, 1.0) for place in "abc"]
    measured = {"a@1": 2.0, "b@1": 1000.0, "c@1": -1.0}

    def attempt(candidate):
        candidate.loss = measured[candidate.action.target]
        return True

    scales = measure_ladders(pool, attempt)
    assert scales == {"a": 2.0, "b": 2.0 * CLIP, "c": 2.0 / CLIP}


def test_a_place_whose_trial_fails_counts_as_the_middle_of_its_family():
    pool = [rung(place, 1, 1.0) for place in "abc"]

    def attempt(candidate):
        candidate.loss = 3.0
        return candidate.action.place != "b"

    assert measure_ladders(pool, attempt)["b"] == 3.0


def test_an_allocated_run_keeps_its_budget_and_says_what_became_of_each(residual, residual_data):
    budget = "relative_error<=0.1"
    result = redpass.optimize(
        residual, "drop_branches,drop_layers", budget=budget, data=residual_data, search="allocated"
    )
    outcomes = {action.outcome for action in result.record.actions}
    assert "applied" in outcomes
    assert outcomes <= {"applied", "refused"}
    assert result.record.verdict == "met"


def test_an_allocated_run_stops_at_its_goal(residual, residual_data):
    runs = [
        redpass.optimize(
            residual, "drop_branches", budget=budget, data=residual_data, search="allocated"
        )
        for budget in ("relative_error<=0.6,parameters<=-20%", "relative_error<=0.6")
    ]
    short, long = (
        sum(action.outcome == "applied" for action in run.record.actions) for run in runs
    )
    assert 0 < short < long
    before, after = runs[0].record.before, runs[0].record.after
    assert after.parameters <= 0.8 * before.parameters


@pytest.mark.parametrize("share", [0.3, 0.6])
def test_a_share_is_never_exceeded(residual, residual_data, share):
    chosen = redpass.budget.choose(
        residual,
        "drop_branches,drop_layers",
        share=share,
        data=residual_data.calibration,
        search="allocated",
    )
    assert 0 < chosen.removed <= share
