"""Searching over candidates: one pool for all passes, both methods, shares, planted branches."""

from __future__ import annotations

import sys
import weakref
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent / "analysis"))
import zoo

import redpass
from redpass.analysis import structure
from redpass.budget import choose, quality
from redpass.budget.candidates import PATIENCE, Candidate, Greedy
from redpass.budget.trials import Trials
from redpass.errors import DataError, PassError, UsageError
from redpass.facts import Facts
from redpass.fingerprint import fingerprint
from redpass.passes.drop_branches import DropBranches
from redpass.passes.drop_layers import DropLayers
from redpass.plan import Action
from redpass.recipe import replay
from testbed import planted

LOOSE = "relative_error<=0.6"


def applied(result: redpass.Result) -> list[str]:
    return [a.key for a in result.record.actions if a.outcome == "applied"]


def test_candidates_of_several_passes_are_one_pool(residual, residual_data):
    passes = "drop_branches,drop_layers,drop_span(lengths=2)"
    result = redpass.optimize(residual, passes, budget=LOOSE, data=residual_data)
    done = applied(result)
    assert done
    assert {p.name for p in result.record.passes} == {"drop_branches", "drop_layers", "drop_span"}
    reasons = {a.why for a in result.record.actions if a.outcome == "refused"}
    assert "nothing of it is left to do after what was accepted" in reasons
    assert len(result.record.recipe.passes) == 1
    assert replay(residual, result.record.recipe).text == result.program.text


def test_no_program_is_measured_twice_where_the_first_batches_are_all(
    residual, residual_data, monkeypatch
):
    seen, real = [], quality.evaluate_all

    def watched(metrics, program, original, batches, **more):
        seen.append((program, batches))
        return real(metrics, program, original, batches, **more)

    monkeypatch.setattr(quality, "evaluate_all", watched)
    assert applied(redpass.optimize(residual, "drop_branches", budget=LOOSE, data=residual_data))
    pairs = [(id(program), id(batches)) for program, batches in seen]
    assert len(set(pairs)) == len(pairs)


def test_branches_that_went_with_their_layer_are_told(residual, residual_data):
    result = redpass.optimize(
        residual, "drop_layers", budget="relative_error<=0.1", data=residual_data
    )
    gone = {branch.label for branch in result.record.branches if branch.outcome == "dropped"}
    assert gone == {"layers.1.feed-forward", "layers.2.feed-forward"}


def test_the_path_of_the_search_is_in_the_record(residual, residual_data):
    result = redpass.optimize(residual, "drop_branches", budget=LOOSE, data=residual_data)
    (curve,) = result.record.curves
    assert curve.method == "greedy: drop_branches"
    assert [point.label for point in curve.points] == ["", *applied(result)]
    removed = [point.removed for point in curve.points]
    assert removed == sorted(removed)
    start, after = result.record.before.parameters, result.record.after.parameters
    assert removed[-1] == pytest.approx(1 - after / start)


def test_one_shot_takes_the_first_of_its_own_order(residual, residual_data):
    budget = "relative_error<=0.1"
    result = redpass.optimize(
        residual, "drop_branches", budget=budget, data=residual_data, search="one-shot"
    )
    facts = Facts(residual, residual_data.calibration)
    order = [action.key for action in DropBranches().plan(residual, facts).actions]
    done = applied(result)
    assert done == order[: len(done)]
    assert len(done) == 2


def test_one_shot_stops_at_the_goal(residual, residual_data):
    budget = f"{LOOSE},parameters<=-20%"
    result = redpass.optimize(
        residual, "drop_branches", budget=budget, data=residual_data, search="one-shot"
    )
    assert [a.outcome for a in result.record.actions].count("applied") == 1
    assert result.record.verdict == "met"


def test_an_unknown_search_is_named(residual, residual_data):
    with pytest.raises(UsageError, match="unknown search 'greed'"):
        redpass.optimize(residual, budget=LOOSE, data=residual_data, search="greed")


@pytest.mark.parametrize("last", [1, 4, 7])
def test_an_interrupted_run_goes_on_to_the_same_result(
    residual, residual_data, tmp_path, monkeypatch, last
):
    real, count = quality._measure, 0

    def run(**more):
        return redpass.optimize(
            residual, "drop_branches,drop_layers", budget=LOOSE, data=residual_data, **more
        )

    def stopping(*args):
        nonlocal count
        count += 1
        if count > last:
            raise KeyboardInterrupt
        return real(*args)

    expected = run()
    monkeypatch.setattr(quality, "_measure", stopping)
    with pytest.raises(KeyboardInterrupt):
        run(journal=tmp_path / "journal")
    monkeypatch.setattr(quality, "_measure", real)
    resumed = run(journal=tmp_path / "journal", resume=True)
    assert applied(resumed) == applied(expected)
    assert resumed.program.text == expected.program.text
    for name, value in expected.program.weights.items():
        assert torch.equal(resumed.program.weights[name], value)


def run_both(program, data, **more):
    passes = "drop_branches,prune_channels"
    return redpass.optimize(program, passes, budget="relative_error<=0.3", data=data, **more)


@pytest.fixture
def made(monkeypatch):
    """The programs that trials were made as."""
    found: list[weakref.ref[redpass.Program]] = []
    real = Trials.make

    def make(self, candidate):
        program = real(self, candidate)
        found.extend([weakref.ref(program)] if program else [])
        return program

    monkeypatch.setattr(Trials, "make", make)
    return found


def test_a_resumed_run_makes_no_program_for_a_trial_on_record(
    residual, residual_data, tmp_path, monkeypatch, made
):
    expected = run_both(residual, residual_data)
    with monkeypatch.context() as patch:
        patch.setattr(Trials, "drop_idle", lambda _: sys.exit("killed behind the last trial"))
        with pytest.raises(SystemExit):
            run_both(residual, residual_data, journal=tmp_path / "journal")
    before = len(made)
    resumed = run_both(residual, residual_data, journal=tmp_path / "journal", resume=True)
    assert before > 2 * len(applied(expected)) > 4
    assert len(made) == before
    assert applied(resumed) == applied(expected)
    assert fingerprint(resumed.program) == fingerprint(expected.program)


def test_programs_that_were_tried_are_let_go(residual, residual_data, monkeypatch, made):
    real, alive = Trials.together, []

    def together(self, wanted):
        alive.append(sum(program() is not None for program in made))
        return real(self, wanted)

    monkeypatch.setattr(Trials, "together", together)
    run_both(residual, residual_data)
    assert len(made) > 3 * PATIENCE
    # Those tried at this step, what was accepted, and what values are kept of.
    assert max(alive) <= PATIENCE + 2


@pytest.mark.parametrize("search", ["greedy", "one-shot", "random"])
def test_a_share_is_never_exceeded(residual, residual_data, search):
    chosen = choose(
        residual, "drop_branches", share=0.6, data=residual_data.calibration, search=search
    )
    assert 0.4 < chosen.removed <= 0.6
    assert len(chosen.actions) == 2
    if search == "greedy":
        targets = {action.target for action in chosen.actions}
        assert targets == {"layers.1.feed-forward", "layers.2.feed-forward"}
        assert [point.label for point in chosen.curve.points[1:]] == [a.key for a in chosen.actions]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"share": 1.0}, "a share of 1.0"),
        ({"share": 0.2, "cost": "parameter"}, "'parameter' is not known here"),
        ({"share": 0.2, "search": "shot"}, "'shot' is not known here"),
    ],
)
def test_bad_wishes_are_named(residual, residual_data, options, message):
    with pytest.raises(UsageError, match=message):
        choose(residual, "drop_branches", data=residual_data.calibration, **options)


def action(name: str) -> Action:
    return Action("test.rule", name, (), "for the test")


def test_greedy_tries_again_only_what_may_be_best():
    losses = dict(zip("abcdefghij", range(1, 11), strict=True))
    pool = [Candidate(DropLayers(), action(name), loss, 0.1, 0) for name, loss in losses.items()]
    tried = []

    def attempt(candidate):
        tried.append(candidate.action.target)
        candidate.loss, candidate.step = candidate.loss + 1.5, 1
        return True

    best = Greedy(attempt).next(pool, 1)
    assert best is not None
    assert best.action.target == "a"
    assert tried == ["a", "b"]  # c was worse already than a is now


def test_greedy_does_not_try_all_again_when_all_got_worse():
    pool = [Candidate(DropLayers(), action(str(n)), n + 1.0, 0.1, 0) for n in range(20)]
    tried = []

    def attempt(candidate):
        tried.append(candidate)
        candidate.loss, candidate.step = candidate.loss * 100, 1
        return True

    assert Greedy(attempt).next(pool, 1) is pool[0]
    assert len(tried) == PATIENCE


@pytest.mark.parametrize("name", [n for n in planted.names() if n.startswith("zero_branches")])
def test_planted_zero_branches_are_all_found_and_dropped(name):
    case = planted.build(name)
    program = redpass.load(case.module)
    rows = torch.randint(60, (12, 2, 9), generator=torch.Generator().manual_seed(3))
    data = redpass.split(redpass.Batches(tuple({"input_ids": row} for row in rows)))
    result = redpass.optimize(program, "drop_branches", budget="relative_error<=1e-12", data=data)
    wanted = [finding for finding in case.findings if finding.removable]
    assert len(applied(result)) == len(wanted)
    kept = structure(result.program).branches
    assert len(kept) == len(structure(program).branches) - len(wanted)
    ids = {"input_ids": rows[0]}
    from redpass.verify.originals import quality_port, run_port

    port = quality_port(program).name
    assert torch.equal(run_port(result.program, ids, port), run_port(program, ids, port))


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))

    def forward(self, x):
        return self.net(x)


@pytest.fixture(scope="module")
def plain():
    torch.manual_seed(0)
    return redpass.load(
        Plain().eval(), example={"x": torch.randn(2, 5, 8)}, inputs=["x:float32[batch,seq,8]"]
    )


@pytest.mark.parametrize("name", ["drop_branches", "drop_layers", "drop_span", "share_layers"])
def test_a_model_without_a_stream_is_told_when_the_pass_was_named(plain, residual_data, name):
    with pytest.raises(PassError, match=f"{name}: no residual stream"):
        redpass.optimize(plain, name, budget=LOOSE, data=residual_data)


def test_a_model_without_a_stream_is_no_fault_otherwise(plain, residual_data):
    result = redpass.optimize(plain, budget=LOOSE, data=residual_data)
    assert result.record.verdict == "met"
    assert any("no residual stream" in skip.reason for skip in result.record.skips)


def test_rows_shorter_than_two_tokens_are_refused():
    program = zoo.load("llama")
    data = redpass.Batches(tuple({"input_ids": torch.tensor([[n], [n + 1]])} for n in range(4)))
    with pytest.raises(DataError, match="too few for metric 'loss'"):
        choose(program, "drop_branches", share=0.2, data=data)
