"""Maps of the stream where layers were dropped: they help, they are thin, they can be refused."""

from __future__ import annotations

import pytest
import torch
from building import Builder, aten
from test_depth_passes import STILL, tower
from test_refit_projections import error, refitted, rows, without

import redpass
from redpass import rewrite
from redpass.data import Batches, Splits
from redpass.errors import DataError, UsageError
from redpass.facts import Facts
from redpass.passes.drop_branches import DropBranches
from redpass.passes.map_stream import NOTHING, MapStream
from redpass.program import Program
from redpass.recipe import replay
from redpass.verify.rules import check_rules


def linear_tower() -> Program:
    """Three layers on a stream of 8; the middle one adds a map of rank 1 and nothing else."""
    generator = torch.Generator().manual_seed(0)
    b = Builder()
    x = b.input("x", "batch", 8)
    weights = [
        (torch.randn(6, 8, generator=generator), torch.randn(8, 6, generator=generator))
        for _ in range(3)
    ]
    weights[1] = (weights[1][0][:1], weights[1][1][:, :1])
    pairs = [(b.weight(f"up{i}", u), b.weight(f"down{i}", d)) for i, (u, d) in enumerate(weights)]
    for layer, (up, down) in enumerate(pairs):
        hidden = b.call(aten.linear.default, x, up)
        hidden = hidden if layer == 1 else b.call(aten.relu.default, hidden)
        x = b.call(aten.add.Tensor, x, b.call(aten.linear.default, hidden, down))
    return b.program(x)


def wide_rows(seed: int) -> Batches:
    generator = torch.Generator().manual_seed(seed)
    return Batches(tuple({"x": torch.randn(64, 8, generator=generator)} for _ in range(4)))


def mapped(program: Program, data: Batches, rank: int = 0):
    plan = MapStream(rank).plan(program, Facts(program, data))
    return plan, rewrite.apply(program, plan.actions)


def test_a_layer_that_was_a_thin_map_comes_back_whole():
    original = linear_tower()
    dropped = without(original, 1)
    plan, after = mapped(dropped, wide_rows(0), rank=1)
    check_rules(after, paranoid=True)
    x = wide_rows(9)[0]["x"]
    off, lost = ((p(x)[0] - original(x)[0]).norm() for p in (after, dropped))
    assert off < 1e-3 * lost
    thin = [tuple(w.shape) for name, w in after.weights.items() if "map" in name]
    assert sorted(thin) == [(1,), (1, 8), (8, 1)]
    assert plan.actions[0].evidence["maps"] == 1


def test_there_is_no_map_where_it_gains_nothing():
    plan, _ = mapped(without(tower(), STILL), rows(0))
    assert plan.actions == ()
    assert plan.skips[0].reason == NOTHING
    assert mapped(tower(), rows(0))[0].actions == ()


def test_one_batch_and_ranks_that_cannot_be_are_refused():
    dropped = without(tower(4), 2)
    with pytest.raises(DataError, match="two calibration batches"):
        mapped(dropped, Batches(rows(0)[:1]))
    with pytest.raises(UsageError, match="rank of -1"):
        mapped(dropped, rows(0), rank=-1)
    with pytest.raises(UsageError, match=r"rank of 5\n  the stream has 4 features"):
        mapped(dropped, rows(0), rank=5)


def splits() -> Splits:
    return Splits(wide_rows(0), wide_rows(1), wide_rows(2))


def test_a_run_keeps_the_map_that_helps_and_replays():
    program = linear_tower()
    passes = (DropBranches(only=("layers.1.feed-forward",)), MapStream())
    result = redpass.optimize(program, passes, budget="relative_error<=2", data=splits())
    outcomes = {a.key: a.outcome for a in result.record.actions}
    assert outcomes["map_stream.ridge:stream"] == "applied"
    again = replay(program, result.record.recipe, data=wide_rows(0))
    x = wide_rows(3)[0]["x"]
    assert torch.equal(again(x)[0], result.program(x)[0])


def test_a_map_that_costs_the_goal_is_refused():
    program = linear_tower()
    passes = (DropBranches(only=("layers.1.feed-forward",)), MapStream(rank=2))
    budget = "relative_error<=2,parameters<=-5%"
    result = redpass.optimize(program, passes, budget=budget, data=splits())
    (record,) = (a for a in result.record.actions if a.pass_name == "map_stream")
    assert record.outcome == "refused"
    assert "the cost goal is not reached any more" in record.why


def test_a_refit_leaves_the_projection_whose_sum_a_map_reads():
    original = tower(4)
    dropped = without(original, 2)
    plan, with_map = mapped(dropped, rows(0))
    assert plan.actions
    refit, after = refitted(with_map, rows(0))
    reasons = [skip.reason for skip in refit.skips]
    assert reasons.count("a map of the stream behind it is fitted already") == 1
    assert error(after, original) <= error(with_map, original)
