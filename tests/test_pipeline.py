"""The whole run on a small residual model: acceptance, rollback, limits, misses, replay."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import redpass
from redpass.config import Settings
from redpass.errors import BudgetError, DataError, LoadError, PassError, UsageError
from redpass.passes.drop_branches import DropBranches
from redpass.plan import Action, Exactness, Insert, Plan, Ref, Replace, WeightRef
from redpass.recipe import bisect, replay
from redpass.record import RunRecord, from_json


@dataclasses.dataclass(frozen=True)
class Scale:
    """A wrong pass: claims exactness and multiplies the named linears' results by `factor`."""

    name = "scale"
    needs = ()
    exactness = Exactness.WITHIN_TOLERANCE
    targets: tuple[str, ...] = ()
    factor: float = 1.0

    def plan(self, program, facts):
        actions = []
        for target in (t for t in self.targets if f"{t}_by" not in program.nodes):
            node = program.nodes[target]
            mul = Insert(
                f"{target}_by",
                torch.ops.aten.mul.Tensor,
                (Ref(target), self.factor if target == "linear_2" else 1.0),
                before=node.next.name,
            )
            actions.append(
                Action("scale.linear", target, (mul, Replace(target, mul.name)), "for the test")
            )
        return Plan(tuple(actions))


def outcomes(record: RunRecord) -> dict[str, str]:
    return {action.target: action.outcome for action in record.actions}


@pytest.fixture(scope="module")
def dropped(residual, residual_data):
    return redpass.optimize(
        residual, budget="relative_error<=0.1", data=residual_data, reduce="drop_branches"
    )


def test_branches_that_do_little_are_dropped_and_the_others_refused(dropped):
    drops = [a for a in dropped.record.actions if a.pass_name == "drop_branches"]
    assert [a.target for a in drops if a.outcome == "applied"] == [
        "layers.1.feed-forward",
        "layers.2.feed-forward",
    ]
    assert {a.outcome for a in drops} == {"applied", "refused"}
    refused = next(a for a in drops if a.outcome == "refused")
    assert "relative_error" in refused.why
    assert "limit relative_error<=0.1" in refused.why


def test_dropping_a_zero_branch_changes_no_bit(residual, residual_data):
    passes = (DropBranches(),)
    result = redpass.optimize(residual, passes, budget="relative_error<=1e-12", data=residual_data)
    applied = [a.target for a in result.record.actions if a.outcome == "applied"]
    assert applied == ["layers.1.feed-forward"]
    x = torch.randn(3, 7, 8)
    assert torch.equal(result.program(x)[0], residual(x)[0])


def test_parameters_and_flops_go_down_by_the_dropped_share(dropped):
    before, after = dropped.record.before, dropped.record.after
    each = 16 * 64 + 64 + 64 * 16 + 16 + 32
    tied = 32  # the two norms that stay hold the same ones and zeros
    assert before.parameters - after.parameters == 2 * each + tied
    assert after.flops < before.flops


def test_quality_is_reported_on_data_that_chose_nothing(dropped):
    splits = {q.split: q for q in dropped.record.quality}
    assert set(splits) == {"choosing", "reporting"}
    assert splits["reporting"].met
    assert dropped.record.verdict == "met"


def test_the_input_program_is_untouched(residual, residual_data):
    text = residual.text
    redpass.optimize(residual, budget="relative_error<=0.1", data=residual_data)
    assert residual.text == text


def test_a_goal_stops_the_search_once_it_is_reached(residual, residual_data):
    result = redpass.optimize(
        residual, budget="relative_error<=0.5,parameters<=-10%", data=residual_data
    )
    drops = [a for a in result.record.actions if a.pass_name == "drop_branches"]
    assert [a.outcome for a in drops] == ["applied", "refused", "refused", "refused"]
    assert drops[1].why == "not needed: the cost goal was reached before it"


def test_a_goal_out_of_reach_misses_the_budget(residual, residual_data):
    with pytest.raises(BudgetError, match=r"parameters<=-90% was not reached.*parameters changed"):
        redpass.optimize(
            residual, budget="relative_error<=0.1,parameters<=-90%", data=residual_data
        )


def test_a_budget_the_original_misses_is_refused_before_the_search(residual, residual_data):
    with pytest.raises(BudgetError, match="original model itself misses"):
        redpass.optimize(residual, budget="cosine>=1.5", data=residual_data)


def test_a_miss_on_the_reporting_data_names_the_guilty_action(residual, residual_data):
    shifted = tuple({"x": batch["x"] * 0.1} for batch in residual_data.reporting)
    data = dataclasses.replace(residual_data, reporting=redpass.Batches(shifted))
    with pytest.raises(BudgetError) as caught:
        redpass.optimize(
            residual, budget="relative_error<=0.004", data=data, reduce="drop_branches"
        )
    assert caught.value.place == "drop_branches.similar:layers.2.feed-forward"
    assert caught.value.record.verdict == "missed"


def test_a_wrong_rewrite_is_rolled_back_alone_and_named(residual):
    wrong = Scale(("linear", "linear_1", "linear_2", "linear_3"), 1.001)
    result = redpass.optimize(residual, (wrong,))
    assert outcomes(result.record) == {
        "linear": "applied",
        "linear_1": "applied",
        "linear_2": "rolled back",
        "linear_3": "applied",
    }
    assert "output_0" in next(a.why for a in result.record.actions if a.outcome == "rolled back")


def test_the_limit_counts_applied_actions(residual, residual_data):
    settings = Settings(limit=1)
    result = redpass.optimize(
        residual, (DropBranches(),), budget="relative_error<=0.1", data=residual_data,
        settings=settings,
    )  # fmt: skip
    assert [a.outcome for a in result.record.actions].count("applied") == 1
    assert "beyond limit" in {a.outcome for a in result.record.actions}


def test_an_action_can_be_skipped_by_its_key(residual, residual_data):
    settings = Settings(skip=("drop_branches.similar:layers.1.feed-forward",))
    result = redpass.optimize(
        residual, (DropBranches(),), budget="relative_error<=0.1", data=residual_data,
        settings=settings,
    )  # fmt: skip
    assert outcomes(result.record)["layers.1.feed-forward"] == "skipped by user"


def test_approximate_passes_need_a_budget_and_data(residual):
    with pytest.raises(BudgetError, match="drop_branches: an approximate pass needs"):
        redpass.optimize(residual, "drop_branches")
    with pytest.raises(DataError, match="needs data"):
        redpass.optimize(residual, "drop_branches", budget="cosine>=0.9")


def test_a_pass_that_fails_inside_leaves_a_reproducer(residual, tmp_path):
    class Broken(Scale):
        def plan(self, program, facts):
            raise ZeroDivisionError("inside")

    with pytest.raises(PassError, match="ZeroDivisionError: inside") as caught:
        redpass.optimize(residual, (Broken(),), settings=Settings(dump=tmp_path))
    folder = next(tmp_path.glob("redpass-reproducer-*"))
    assert str(folder) in caught.value.hint
    assert (folder / "graph.txt").read_text().startswith(residual.text[:40])


def test_an_edit_that_names_nothing_is_rolled_back(residual):
    @dataclasses.dataclass(frozen=True)
    class Lost(Scale):
        def plan(self, program, facts):
            edit = Replace("linear", WeightRef("nowhere"))
            return Plan((Action("lost.edit", "linear", (edit,), "for the test"),))

    result = redpass.optimize(residual, (Lost(),))
    action = result.record.actions[0]
    assert (action.outcome, "nowhere" in action.why) == ("rolled back", True)


def test_replay_gives_the_same_program_without_data(dropped, residual):
    again = replay(residual, dropped.record.recipe)
    assert again.text == dropped.program.text


def test_replay_refuses_another_model(dropped, residual):
    other = dataclasses.replace(residual.origin, digest="0" * 64)
    with pytest.raises(LoadError, match="weights differ"):
        replay(dataclasses.replace(residual, origin=other), dropped.record.recipe)


def test_bisect_finds_the_action_that_broke_the_result(dropped, residual):
    branches = redpass.structure(residual).branches
    third = next(b for b in branches if b.label == "layers.2.feed-forward")
    weight = next(name for name in third.weights if name.endswith("up.weight"))
    found = bisect(residual, dropped.record.recipe, lambda program: weight in program.weights)
    assert found == "drop_branches.similar:layers.2.feed-forward"


def test_the_record_survives_json(dropped):
    import json

    text = dropped.record.to_json()
    assert from_json(RunRecord, json.loads(text)) == dropped.record


def test_unknown_passes_and_options_are_named_with_the_nearest(residual):
    with pytest.raises(UsageError, match=r"unknown pass 'drop_branch'\n.*drop_branches"):
        redpass.optimize(residual, "drop_branch")
    with pytest.raises(UsageError, match=r"unknown option 'kind'\n.*kinds"):
        redpass.optimize(residual, "drop_branches(kind=attention)")
