"""Heads that go: silent ones for nothing, others by what they add, key heads with their cache."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from attending import DIM, Attending, check_same
from checking import plan_pass
from torch import Tensor

from redpass import bench, rewrite
from redpass.analysis.cost import total_cost
from redpass.analysis.heads.contributions import head_contributions, kept_heads, shapes
from redpass.analysis.heads.sites import head_sites
from redpass.analysis.inspection import DEFAULT_SIZES
from redpass.data import Batches
from redpass.errors import DataError, UsageError
from redpass.facts import Facts
from redpass.passes.prune_heads import PruneHeads
from redpass.plan import Plan
from redpass.program import Program
from redpass.verify.inputs import complete
from redpass.verify.rules import check_rules


def silent(*heads: int):  # type: ignore[no-untyped-def]
    """Takes what heads add out of the output projection."""

    def edit(weights: dict[str, Tensor], layer: int) -> None:
        for head in heads:
            weights["o"][:, head * DIM : (head + 1) * DIM] = 0

    return edit


def planned(program: Program, batches: Batches | None, **options: object) -> Plan:
    return plan_pass(PruneHeads(**options), program, batches)  # type: ignore[arg-type]


ALONE = Attending(edit=silent(1, 3))
GROUPED = Attending(heads=6, keys=3, edit=silent(1, 2, 5))
KINDS = {
    "plain": (ALONE, 2, 2),
    "fused, cache": (replace(ALONE, fused=True, cache=True), 2, 2),
    "rotary, norms": (replace(ALONE, rotary=True, norms=True, bias=False, cache=True), 2, 2),
    "spelled, cache": (replace(ALONE, spelled=True, cache=True), 2, 2),
    "one of each group": (replace(GROUPED, cache=True), 3, 3),
    "one of each group, op": (replace(GROUPED, cache=True, repeats="op"), 3, 3),
    "a whole group": (Attending(keys=2, cache=True, rotary=True, edit=silent(2, 3)), 2, 1),
    "multi-query": (Attending(keys=1, cache=True, edit=silent(0)), 3, 1),
}


@pytest.mark.parametrize("kind", KINDS)
def test_heads_that_add_nothing_go_for_nothing(kind: str) -> None:
    what, left, keys = KINDS[kind]
    program, batches = what.program(), what.batches(4)
    plan = planned(program, batches, shares=())
    assert [action.target for action in plan.actions] == [f"layers.0.attention@{left}"]
    action = plan.actions[0]
    assert action.loss is not None
    assert action.loss < 1e-10
    after = rewrite.apply(program, plan.actions)
    check_rules(after)
    check_same(program, after, batches)
    before, now = total_cost(program), total_cost(after)
    assert before.parameters - now.parameters == action.saving["parameters"]
    assert before.bytes - now.bytes == action.saving["bytes"]
    assert before.flops(DEFAULT_SIZES) - now.flops(DEFAULT_SIZES) == action.saving["flops"]
    assert now.kv_bytes_per_token == (2 * keys * DIM * 4 if what.cache else 0)
    kept = {name.removesuffix(f"_heads{left}") for name in after.weights}
    assert kept <= set(program.weights)


def test_a_smaller_cache_is_timed_beside_the_one_it_was() -> None:
    what = replace(ALONE, cache=True)
    program, batches = what.program(), what.batches()
    after = rewrite.apply(program, planned(program, batches, shares=(0.5,)).actions)
    assert after.signature.inputs != program.signature.inputs
    runners, sizes = ("eager", "onnxruntime"), [{"batch": 2, "seq": 1, "past": 5}]
    table = bench.compare(program, after, runners=runners, sizes=sizes, rounds=3, threads=1)
    assert [row.failure for row in table.rows] == ["", ""]


def test_contribution_is_what_a_head_adds() -> None:
    program, batches = ALONE.program(), ALONE.batches(2)
    scores = Facts(program, batches).get(head_contributions)["layers.0.attention"]
    assert scores[1] == scores[3] == 0.0
    site = Facts(program).get(head_sites).found["layers.0.attention"]
    total = 0.0
    for head in (0, 2):  # the output without the head differs by what the head adds
        weights = dict(program.weights)
        weights["layers.0.o"] = weights["layers.0.o"].clone()
        weights["layers.0.o"][:, site.columns[head]] = 0
        without = replace(program, weights=weights)
        off = sum(float((without(**b)[0] - program(**b)[0]).square().sum()) for b in batches_of(
            program, batches))  # fmt: skip
        size = sum(float(program(**b)[0].square().sum()) for b in batches_of(program, batches))
        assert scores[head] == pytest.approx(off / size, rel=1e-3)
        total += scores[head]
    assert total > 0


def batches_of(program: Program, batches: Batches) -> list[dict[str, Tensor]]:
    return [complete(program, batch) for batch in batches]


def test_fitted_projections_lose_less_and_rungs_lose_more_the_fewer_heads_stay() -> None:
    what = Attending(heads=8, keys=8, layers=2)
    program, batches = what.program(), what.batches(8, rows=8)
    fitted, rough = (planned(program, batches, refit=refit) for refit in (True, False))
    losses = {a.target: a.loss or 0.0 for a in fitted.actions}
    assert sorted(losses) == [f"layers.{n}.attention@{c}" for n in (0, 1) for c in (2, 4, 6)]
    for action in rough.actions:
        assert losses[action.target] < 0.95 * (action.loss or 0.0)
    for layer in (0, 1):
        two, four, six = (losses[f"layers.{layer}.attention@{c}"] for c in (2, 4, 6))
        assert two > four > six
    # What is predicted on the calibration rows is what happens there.
    for action in fitted.actions[:2]:
        after = rewrite.apply(program, [action])
        stream = "add_tensor" if action.target.startswith("layers.0") else "out0"
        if stream == "out0":
            off = sum(float((after(**b)[0] - program(**b)[0]).square().sum()) for b in batches_of(
                program, batches))  # fmt: skip
            size = sum(float(program(**b)[0].square().sum()) for b in batches_of(program, batches))
            assert action.loss == pytest.approx(off / size, rel=1e-2)


def test_places_compose_and_keep_their_names() -> None:
    what = Attending(keys=2, layers=2, cache=True)
    program, batches = what.program(), what.batches(4)
    plan = planned(program, batches, shares=(0.5,))
    assert sorted(a.place for a in plan.actions) == [f"layers.{n}.attention/heads" for n in (0, 1)]
    after = rewrite.apply(program, plan.actions)
    check_rules(after)
    assert total_cost(program).parameters - total_cost(after).parameters == sum(
        action.saving["parameters"] for action in plan.actions
    )
    again = planned(program, batches, only=tuple(a.target for a in plan.actions))
    assert [a.key for a in again.actions] == [a.key for a in plan.actions]
    one, other = (rewrite.apply(program, p.actions) for p in (plan, again))
    inputs = complete(one, batches[0])
    assert torch.equal(one(**inputs)[0], other(**inputs)[0])


def test_counts_that_grouping_allows() -> None:
    program = GROUPED.program()
    site = Facts(program).get(head_sites).found["layers.0.attention"]
    assert shapes(site) == {4: ((2, 2),), 3: ((3, 1),), 2: ((1, 2), (2, 1)), 1: ((1, 1),)}
    scores = (0.1, 0.0, 0.5, 0.2, 0.3, 0.4)
    assert kept_heads(site, (2, 2), scores) == (2, 3, 4, 5)
    assert kept_heads(site, (3, 1), scores) == (0, 2, 5)
    assert kept_heads(site, (1, 1), scores) == (2,)


def test_bad_requests_are_refused_before_any_work() -> None:
    program, batches = GROUPED.program(), GROUPED.batches(2)
    for options, text in (
        ({"only": ("layers.0.attention@5",)}, "3 key heads cannot share 5 query heads evenly"),
        ({"only": ("layers.0.attention@6",)}, "no count of heads"),
        ({"only": ("layers.0.attention@0",)}, "no count of heads"),
        ({"only": ("layers.1.attention@2",)}, "no attention is called"),
        ({"shares": (0.0,)}, "a share of 0.0"),
    ):
        with pytest.raises(UsageError, match=text):
            planned(program, batches, **options)
    with pytest.raises(DataError, match="no data"):
        planned(program, None)


def test_values_that_are_not_finite_are_named() -> None:
    def edit(weights: dict[str, Tensor], layer: int) -> None:
        weights["v"][0] = float("inf")

    what = Attending(edit=edit)
    with pytest.raises(DataError, match="NaN or infinite") as error:
        planned(what.program(), what.batches(2))
    assert "layers.0.attention" in str(error.value)


def test_a_single_head_and_no_attention_are_left_alone() -> None:
    one = Attending(heads=1, keys=1)
    plan = planned(one.program(), one.batches(2))
    assert [skip.target for skip in plan.skips] == ["layers.0.attention"]
    assert not plan.actions
