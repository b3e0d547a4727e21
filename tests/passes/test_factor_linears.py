"""Low-rank linears: planted ranks for free, whitened against plain, tied weights, bad input."""

from __future__ import annotations

import pytest
import torch
from building import Builder, aten
from checking import applied, plan_pass
from torch import Tensor

from redpass.data import Batches, Splits
from redpass.errors import DataError, UsageError
from redpass.passes.factor_linears import FactorLinears
from redpass.passes.spec import format_pass, parse_passes
from redpass.plan import Action, Plan
from redpass.program import Program

WIDTH = 24


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) / shape[-1] ** 0.5


def _rows(seed: int = 0, count: int = 4, tokens: int = 32, width: int = WIDTH) -> Batches:
    """Inputs whose channels depend on each other and have a mean."""
    generator = torch.Generator().manual_seed(seed)
    mix = _random(width, width, seed=99) * torch.logspace(0, -2, width)
    x = [torch.randn(tokens, width, generator=generator) @ mix + 0.5 for _ in range(count)]
    return Batches(tuple({"x": value} for value in x))


def _one(weight: Tensor, form: str = "linear") -> Program:
    """One linear on the input, written in any of its forms."""
    b = Builder()
    x = b.input("x", "batch", weight.shape[1])
    bias = b.weight("b", _random(len(weight), seed=5))
    if form == "linear":
        out = b.call(aten.linear.default, x, b.weight("w", weight), bias)
    elif form == "addmm":
        out = b.call(aten.addmm.default, bias, x, b.weight("w", weight.t().contiguous()))
    else:
        out = b.call(aten.mm.default, x, b.weight("w", weight.t().contiguous()))
    return b.program(out)


def _plan(program: Program, data: Batches | None = None, **options: object) -> Plan:
    return plan_pass(FactorLinears(**options), program, data)


def _error(after: Program, before: Program, data: Batches) -> float:
    gaps = [(after(**row)[0] - before(**row)[0]).square().sum() for row in data]
    whole = [before(**row)[0].square().sum() for row in data]
    return float(sum(gaps) / sum(whole))


@pytest.mark.parametrize("form", ["linear", "addmm", "mm"])
@pytest.mark.parametrize("whiten", [True, False])
def test_a_planted_rank_costs_nothing_in_every_form_of_a_linear(form: str, whiten: bool) -> None:
    program = _one(_random(40, 3) @ _random(3, WIDTH, seed=1), form)
    plan = _plan(program, _rows(), whiten=whiten, multiple=1)
    (action,) = (a for a in plan.actions if a.evidence["rank"] == 3)
    assert action == max(plan.actions, key=lambda a: a.evidence["rank"])
    assert "the weight is of that rank" in action.reason
    after = applied(program, action)
    assert _error(after, program, _rows(7)) < 1e-11
    shapes = {tuple(sorted(w.shape)) for w in after.weights.values() if w.dim() == 2}
    assert shapes == {(3, 40), (3, WIDTH)}
    assert action.saving["parameters"] == 40 * WIDTH - 3 * (40 + WIDTH)


def test_whitened_beats_plain_and_the_bias_makes_up_for_the_mean() -> None:
    program = _one(_random(40, WIDTH))
    errors = {}
    for whiten in (True, False):
        plan = _plan(program, _rows(), whiten=whiten, multiple=1, shares=(0.4,))
        errors[whiten] = _error(applied(program, *plan.actions), program, _rows(7))
    assert errors[True] < 0.5 * errors[False]
    mean = _rows(7, tokens=4000)[0]["x"]
    gap = applied(program, *plan.actions)(mean)[0].mean(0) - program(mean)[0].mean(0)
    assert float(gap.norm()) < 0.05 * float(program(mean)[0].mean(0).norm())


def test_the_predicted_loss_is_the_error_that_is_measured() -> None:
    """Outside of any branch: the squared error as a share of the output's variance."""
    program, data = _one(_random(40, WIDTH)), _rows(count=10, tokens=2000)
    for whiten in (True, False):
        for action in _plan(program, data, whiten=whiten, multiple=1).actions:
            after, rows = applied(program, action), torch.cat([row["x"] for row in data])
            out = program(rows)[0]
            gap = (after(rows)[0] - out).square().sum() / (out - out.mean(0)).square().sum()
            assert action.loss == pytest.approx(float(gap), rel=0.1, abs=1e-3)


def test_ladders_are_rungs_of_one_place_and_only_save(residual: Program, residual_data: Splits):
    plan = _plan(residual, residual_data.calibration, multiple=2)
    assert [a.loss for a in plan.actions] == sorted(a.loss for a in plan.actions)
    assert len({action.key for action in plan.actions}) == len(plan.actions)
    for action in plan.actions:
        label, _, rank = action.target.rpartition("@")
        assert action.place == f"{label}/rank"
        assert int(rank) == action.evidence["rank"]
        assert action.saving["parameters"] > 0
        assert action.saving["flops"] > 0
    by_place: dict[str, list[Action]] = {}
    for action in plan.actions:
        by_place.setdefault(action.place, []).append(action)
    for rungs in by_place.values():
        falling = sorted(rungs, key=lambda a: -a.evidence["rank"])
        assert [a.loss for a in falling] == sorted(a.loss for a in rungs)


def test_the_loss_of_an_exit_is_its_share_of_the_stream(residual: Program, residual_data: Splits):
    """The branch that does next to nothing has next to nothing to lose."""
    plan = _plan(residual, residual_data.calibration, multiple=2, shares=(0.5,))
    losses = {action.target.rpartition("@")[0]: action.loss for action in plan.actions}
    assert losses["blocks.2.down"] < 0.01 * losses["blocks.3.down"]
    assert losses["blocks.2.up"] < 0.01 * losses["blocks.3.up"]


def test_fisher_information_sees_what_the_stream_hides(
    residual: Program, residual_data: Splits
) -> None:
    """The same cuts in the same places; what nothing reads has no loss, whatever its size."""
    b = Builder()
    x = b.input("x", "batch", WIDTH)
    loud = b.call(aten.linear.default, x, b.weight("loud", 9 * _random(WIDTH, WIDTH)))
    heard = b.call(aten.linear.default, x, b.weight("heard", _random(WIDTH, WIDTH, seed=3)))
    program = b.program(b.call(aten.add.Tensor, b.call(aten.mul.Tensor, loud, 1e-4), heard))
    losses = {
        a.target: a.loss for a in _plan(program, _rows(), score="fisher", shares=(0.8,)).actions
    }
    assert losses["loud@8"] < 1e-5 * losses["heard@8"]
    options = {"multiple": 2, "shares": (0.5,)}
    data = residual_data.calibration
    one, other = (_plan(residual, data, score=score, **options) for score in ("stream", "fisher"))
    assert {a.key for a in one.actions} == {a.key for a in other.actions}


def test_actions_of_different_places_compose_and_come_again_by_name(
    residual: Program, residual_data: Splits
) -> None:
    data = residual_data.calibration
    plan = _plan(residual, data, multiple=2, shares=(0.6,))
    after = applied(residual, *plan.actions)
    targets = tuple(action.target for action in plan.actions)
    (again,) = parse_passes(format_pass(FactorLinears(only=targets)))
    repeated = applied(residual, *_plan(residual, data, only=again.only).actions)
    x = data[0]
    assert torch.allclose(after(**x)[0], repeated(**x)[0], atol=1e-5)
    rest = _plan(after, data, multiple=2)
    assert {a.place for a in rest.actions} == set()
    assert "it is one of two thin linears already" in {skip.reason for skip in rest.skips}


def _twice(second: str) -> Program:
    """Two linears that read one weight, the second one on what the first one gives."""
    b = Builder()
    x = b.input("x", "batch", WIDTH)
    w = b.weight("w", _random(WIDTH, WIDTH))
    y = b.call(aten.relu.default, b.call(aten.linear.default, x, w))
    if second == "linear":
        out = b.call(aten.linear.default, y, w, b.weight("b", _random(WIDTH, seed=5)))
    elif second == "transposed":
        out = b.call(aten.mm.default, y, w)
    else:
        out = b.call(aten.mul.Tensor, y, b.call(aten.sum.dim_IntList, w, [0]))
    return b.program(out)


def test_a_tied_weight_is_cut_in_all_its_places() -> None:
    program = _twice("linear")
    plan = _plan(program, _rows(), multiple=1, shares=(0.6,))
    (action,) = plan.actions
    after = applied(program, action)
    assert sorted(w.dim() for w in after.weights.values()) == [1, 2, 2]
    assert action.saving["parameters"] == sum(
        sign * w.numel()
        for sign, program_ in ((1, program), (-1, after))
        for w in program_.weights.values()
    )
    assert _error(after, program, _rows(7)) < 0.2


@pytest.mark.parametrize(
    ("second", "reason"),
    [("transposed", "read both as it is and transposed"), ("sum", "something else than a linear")],
)
def test_a_weight_that_cannot_be_cut_everywhere_is_left_alone(second: str, reason: str) -> None:
    plan = _plan(_twice(second), _rows())
    assert plan.actions == ()
    assert reason in plan.skips[0].reason


def test_computed_weights_are_left_alone() -> None:
    b = Builder()
    x = b.input("x", "batch", WIDTH)
    stored = b.weight("w", torch.randint(-8, 8, (WIDTH, WIDTH), dtype=torch.int8))
    scaled = b.call(aten.mul.Tensor, stored, b.weight("s", _random(WIDTH, 1)))
    program = b.program(b.call(aten.linear.default, x, scaled))
    plan = _plan(program, _rows())
    assert plan.actions == ()
    assert "computed, quantised" in plan.skips[0].reason


def test_fewer_tokens_than_channels_work_and_say_so() -> None:
    """A guess that leaves unseen directions in is better than one that believes five tokens."""
    program, few = _one(_random(40, WIDTH)), _rows(count=1, tokens=5)
    plan = _plan(program, few, multiple=1, shares=(0.6,))
    (action,) = plan.actions
    assert (action.evidence["tokens"], action.evidence["channels"]) == (5, WIDTH)
    assert action.loss > 1e-3
    assert _error(applied(program, action), program, _rows(7)) < 0.3


def test_dead_channels_and_constant_inputs_do_no_harm() -> None:
    program = _one(_random(40, WIDTH))
    dead = Batches(({"x": torch.zeros(8, WIDTH)},))
    for action in _plan(program, dead, multiple=1).actions:
        out = applied(program, action)(torch.zeros(2, WIDTH))[0]
        assert torch.allclose(out, program(torch.zeros(2, WIDTH))[0], atol=1e-6)


def test_without_data_only_the_plain_truncation_is_to_be_had() -> None:
    program = _one(_random(40, WIDTH))
    assert _plan(program, whiten=False, multiple=1).actions
    with pytest.raises(DataError, match="--data"):
        _plan(program)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shares": (1.0,)}, "a share of 1"),
        ({"shares": (0.0,)}, "a share of 0"),
        ({"multiple": 0}, "a multiple of 0"),
        ({"score": "guess"}, "no score is called"),
        ({"only": ("w@0",)}, "rank from 1 to 24"),
        ({"only": ("w@25",)}, "rank from 1 to 24"),
        ({"only": ("w@20",)}, "give a rank up to 14"),
        ({"only": ("w@many",)}, "does not say how much is left"),
        ({"only": ("v@4",)}, "did you mean|known: w"),
    ],
)
def test_bad_options_are_refused_before_any_data_are_read(options: dict, message: str) -> None:
    program = _one(_random(40, WIDTH))
    with pytest.raises(UsageError, match=message):
        _plan(program, **options)
