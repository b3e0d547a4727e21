"""Fitting projections anew: it helps, it leaves alone what it must, and it can be replayed."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from test_depth_passes import STILL, tower

import redpass
from redpass import rewrite
from redpass.analysis import refits
from redpass.data import Batches, Splits
from redpass.errors import DataError
from redpass.facts import Facts
from redpass.journal import Journal
from redpass.lineage import extend
from redpass.passes.drop_branches import DropBranches
from redpass.passes.refit_projections import RefitProjections
from redpass.program import Program
from redpass.recipe import needs_data, replay


def rows(seed: int, count: int = 4) -> Batches:
    generator = torch.Generator().manual_seed(seed)
    return Batches(tuple({"x": torch.randn(64, 4, generator=generator)} for _ in range(count)))


def without(program: Program, layer: int) -> Program:
    pass_ = DropBranches(only=(f"layers.{layer}.feed-forward",))
    actions = pass_.plan(program, Facts(program)).actions
    lineage = extend(program, program, actions)
    return replace(rewrite.apply(program, actions), lineage=lineage)


def error(program: Program, original: Program) -> float:
    x = rows(9)[0]["x"]
    now, was = program(x)[0], original(x)[0]
    return float((now - was).norm() / was.norm())


def refitted(program: Program, data: Batches):
    plan = RefitProjections().plan(program, Facts(program, data))
    return plan, rewrite.apply(program, plan.actions)


def test_a_dropped_branch_is_made_up_for_by_those_that_stay():
    original = tower(4)
    dropped = without(original, 2)
    plan, after = refitted(dropped, rows(0))
    evidence = plan.actions[0].evidence
    assert evidence["off_after"] < evidence["off_before"]
    assert error(after, original) < 0.9 * error(dropped, original)
    assert len(after.graph.nodes) == len(dropped.graph.nodes)
    assert {tuple(w.shape) for w in after.weights.values()} == {(6, 4), (4, 6)}


def test_only_what_lies_behind_or_next_before_the_drop_is_fitted():
    dropped = without(tower(4), 2)
    plan, after = refitted(dropped, rows(0))
    assert after.weights.keys() & {"down0", "down1", "down3"} == {"down0"}
    assert plan.actions[0].evidence["projections"] == 2


def test_a_branch_that_did_nothing_leaves_nothing_to_repair():
    plan, _ = refitted(without(tower(), STILL), rows(0))
    assert plan.actions == ()
    assert {skip.reason for skip in plan.skips} == {"a fit gains nothing on the batches held back"}


def test_shared_weights_stay_with_the_reason():
    program = tower(4)
    node = program.nodes["down3"]
    tied = Program(
        program.graph, {**program.weights, "down3": program.weights["down0"]},
        program.signature, program.origin,
    )  # fmt: skip
    assert node.op == "get_attr"
    plan, after = refitted(without(tied, 2), rows(0))
    reasons = {skip.target: skip.reason for skip in plan.skips}
    assert "is shared with another layer" in reasons["layers.2.feed-forward"]
    assert after.weights["down3"] is tied.weights["down0"]


def test_nothing_dropped_is_nothing_to_repair():
    plan, _ = refitted(tower(), rows(0))
    assert plan.skips[0].reason == "no branch was dropped or cut, so there is nothing to repair"


def test_one_batch_cannot_be_held_back():
    with pytest.raises(DataError, match="two calibration batches"):
        refitted(without(tower(), 0), rows(0, count=1))


def test_a_killed_run_goes_on_behind_the_last_fit_it_kept(tmp_path, monkeypatch):
    dropped, data = without(tower(4), 2), rows(0)

    def run(most: int):
        """Fits with a journal, and dies after so many fits."""
        done = []

        def counted(*given, **named):
            if len(done) == most:
                raise KeyboardInterrupt
            done.append(1)
            return best_fit(*given, **named)

        monkeypatch.setattr(refits, "best_fit", counted)
        facts = Facts(dropped, data, Journal.open(tmp_path / "j", "work"))
        return rewrite.apply(dropped, RefitProjections().plan(dropped, facts).actions), len(done)

    best_fit = refits.best_fit
    expected = rewrite.apply(
        dropped, RefitProjections().plan(dropped, Facts(dropped, data)).actions
    )
    with pytest.raises(KeyboardInterrupt):
        run(1)
    found, fits = run(99)
    assert fits == 1, "two are fitted, one was kept"
    assert run(0)[1] == 0
    assert found.weights.keys() == expected.weights.keys()
    assert all(torch.equal(w, expected.weights[name]) for name, w in found.weights.items())


def test_values_that_are_not_finite_are_named():
    program = tower(4)
    broken = {**program.weights, "up3": torch.full_like(program.weights["up3"], float("inf"))}
    broken = Program(program.graph, broken, program.signature, program.origin)
    with pytest.raises(DataError, match=r"layers\.2\.feed-forward.*NaN or infinite"):
        refitted(without(broken, 2), rows(0))


@pytest.fixture(scope="module")
def repaired():
    program, data = tower(6), Splits(rows(0), rows(1), rows(2))
    passes = "drop_branches(only=('layers.4.feed-forward')),refit_projections"
    result = redpass.optimize(program, passes, budget="relative_error<=9", data=data)
    return program, data, result


def test_a_run_keeps_a_repair_that_measures_better(repaired):
    program, _, result = repaired
    outcome = {a.pass_name: a.outcome for a in result.record.actions}
    assert outcome == {"drop_branches": "applied", "refit_projections": "applied"}
    assert "with it on choosing data" in result.record.actions[-1].why
    assert error(result.program, program) < 0.9 * error(without(program, 4), program)


def test_a_recipe_with_a_repair_needs_its_data(repaired):
    program, data, result = repaired
    recipe = result.record.recipe
    assert needs_data(recipe)
    again = replay(program, recipe, data=data.calibration)
    for name, value in result.program.weights.items():
        torch.testing.assert_close(again.weights[name], value)
    with pytest.raises(DataError, match="no data was given"):
        replay(program, recipe)
    with pytest.raises(DataError, match="not the calibration data"):
        replay(program, recipe, data=data.choosing)
