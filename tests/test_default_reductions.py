"""What a run with a budget takes when no reduction is named: branches and channels together."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import redpass
from redpass.config import Settings
from redpass.errors import ExportError
from redpass.plan import Exactness
from tests.conftest import Residual

BUDGET = "relative_error<=0.05"
FAMILIES = {"drop_branches", "prune_channels"}


def wasteful() -> Residual:
    """A network whose second branch does next to nothing and whose others have spare channels.

    Three in four of their channels, at random places, are the rest over again up to a little noise,
    so that no channel is equal to another one bit by bit.
    """
    generator = torch.Generator().manual_seed(3)
    torch.manual_seed(3)
    module = Residual().eval()
    with torch.no_grad():
        for block in module.blocks:
            up, down = block.up, block.down
            for weight in (up.weight, down.weight):
                weight.copy_(
                    torch.randn(weight.shape, generator=generator) / weight.shape[1] ** 0.5
                )
            order = torch.randperm(64, generator=generator)
            up.weight[order[16:]] = up.weight[order[:16]].repeat(3, 1)
            up.bias[order[16:]] = up.bias[order[:16]].repeat(3)
            up.weight += 1e-4 * torch.randn(up.weight.shape, generator=generator)
        module.blocks[1].down.weight.mul_(1e-3)
        module.blocks[1].down.bias.zero_()
    return module


@pytest.fixture(scope="module")
def program():
    example = {"x": torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))}
    return redpass.load(wasteful(), example=example, inputs=["x:float32[batch,seq,8]"])


@pytest.fixture(scope="module")
def usual(program, residual_data):
    return redpass.optimize(program, budget=BUDGET, data=residual_data)


def taken(result) -> dict[str, set[str]]:
    """Pass -> targets of what was applied, approximate passes only."""
    found: dict[str, set[str]] = {}
    for action in result.record.actions:
        if action.outcome == "applied":
            found.setdefault(action.pass_name, set()).add(action.target)
    lossy = {p.name for p in result.record.passes if p.exactness == Exactness.APPROXIMATE.value}
    return {name: targets for name, targets in found.items() if name in lossy}


def test_both_families_are_taken_and_the_budget_is_met(usual):
    found = taken(usual)
    assert found.keys() >= FAMILIES
    assert "layers.1.feed-forward" in found["drop_branches"]
    cut = {target.partition("@")[0] for target in found["prune_channels"]}
    assert cut == {f"layers.{n}.feed-forward" for n in (0, 2, 3)}
    assert usual.record.verdict == "met"
    (reported,) = (q for q in usual.record.quality if q.split == "reporting")
    assert reported.met
    assert reported.value <= 0.05


def test_more_goes_than_with_branches_alone(usual, program, residual_data):
    alone = redpass.optimize(program, budget=BUDGET, data=residual_data, reduce="drop_branches")
    assert usual.record.after.flops < 0.5 * alone.record.after.flops


def test_without_a_budget_a_run_is_exact(program, residual_data):
    result = redpass.optimize(program, data=residual_data)
    assert not taken(result)
    assert {p.exactness for p in result.record.passes} <= {"same bits", "within tolerance"}


def test_a_repair_is_left_out_like_any_other_action(usual, program, residual_data):
    (repaired,) = (a for a in usual.record.actions if a.pass_name == "refit_projections")
    assert repaired.outcome == "applied"
    settings = Settings(skip=("refit_projections",))
    result = redpass.optimize(program, budget=BUDGET, data=residual_data, settings=settings)
    (told,) = (a for a in result.record.actions if a.pass_name == "refit_projections")
    assert told.outcome == "skipped by user"
    assert "refit_projections" not in str(result.record.recipe.passes)
    settings = Settings(limit=repaired.number - 1)
    result = redpass.optimize(program, budget=BUDGET, data=residual_data, settings=settings)
    applied = [a for a in result.record.actions if a.outcome == "applied"]
    assert len(applied) <= repaired.number - 1


def test_a_cut_of_a_branch_that_went_later_is_not_kept(usual):
    (idle,) = (a for a in usual.record.actions if a.why.startswith("nothing of it is left"))
    assert idle.target.startswith("layers.1.feed-forward@")
    assert idle.outcome == "refused"
    numbers = [a.number for a in usual.record.actions if a.outcome == "applied"]
    assert numbers == list(range(1, len(numbers) + 1))


class Pooled(nn.Module):
    """Nothing that could be narrower, and no stream."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.softmax(x, -1).mean(1)


def test_a_model_without_any_place_is_no_fault(residual_data):
    example = {"x": torch.randn(2, 5, 8)}
    program = redpass.load(Pooled(), example=example, inputs=["x:float32[batch,seq,8]"])
    result = redpass.optimize(program, budget=BUDGET, data=residual_data)
    assert result.record.verdict == "met"
    assert not taken(result)
    assert {s.pass_name for s in result.record.skips if s.target == "graph"} >= FAMILIES


def no_cut(program) -> str:
    """A form that holds no narrower width: it knows the weights of the loaded model alone."""
    before, after = program.lineage.source, program.lineage.plain
    sizes = {name: value.shape for name, value in before.weights.items()}
    other = [n for n, v in after.weights.items() if sizes.get(n, v.shape) != v.shape]
    return f"{other[0]}: has another shape" if other else ""


def test_what_a_form_cannot_hold_is_not_tried(residual_data, program):
    passes = "drop_branches,prune_channels"
    result = redpass.optimize(
        program, budget=BUDGET, data=residual_data, reduce=passes, holds=no_cut
    )
    assert taken(result).keys() == {"drop_branches"}
    told = {a.why for a in result.record.actions if a.pass_name == "prune_channels"}
    assert all(why.startswith("a form asked for cannot hold it: ") for why in told)
    with pytest.raises(ExportError, match=r"can hold none of it: .*has another shape"):
        redpass.optimize(
            program, budget=BUDGET, data=residual_data, reduce="prune_channels", holds=no_cut
        )


def test_where_a_form_must_hold_it_layers_stay_alike(residual_data, program):
    result = redpass.optimize(program, budget=BUDGET, data=residual_data, holds=lambda _: "")
    names = {p.spec for p in result.record.passes if p.exactness == "approximate"}
    assert names & {"drop_layers"}
    assert any(name.startswith("prune_channels") and "together=True" in name for name in names)
    shapes = {
        tuple(value.shape) for name, value in result.program.weights.items() if "up.weight" in name
    }
    assert len(shapes) == 1
    assert shapes != {(64, 16)}
