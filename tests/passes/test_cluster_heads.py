"""Heads that share scores: planted ones are found for nothing, whatever the attention is like."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from attending import DIM, Attending, check_same
from checking import plan_pass
from torch import Tensor

from redpass import rewrite
from redpass.analysis import structure
from redpass.analysis.cost import total_cost
from redpass.analysis.heads.clusters import clusters, elbow, equal_count, random_clusters
from redpass.analysis.heads.similarity import head_similarity
from redpass.analysis.inspection import DEFAULT_SIZES
from redpass.codegen.patterns.clustered_attention import find
from redpass.codegen.patterns.site import Site
from redpass.data import Batches
from redpass.errors import DataError, UsageError
from redpass.facts import Facts
from redpass.passes.cluster_heads import ClusterHeads
from redpass.plan import Action, Plan
from redpass.program import Program
from redpass.verify.rules import check_rules


def alike(pairs: dict[int, int], grouped: bool = False):  # type: ignore[no-untyped-def]
    """Gives heads the queries and keys of others; under grouping the queries alone."""

    def edit(weights: dict[str, Tensor], layer: int) -> None:
        for head, other in pairs.items():
            for name in ("q", "qb") if grouped else ("q", "qb", "k", "kb"):
                value = weights[name]
                value[head * DIM : (head + 1) * DIM] = value[other * DIM : (other + 1) * DIM]

    return edit


def planned(program: Program, batches: Batches | None, **options: object) -> Plan:
    return plan_pass(ClusterHeads(**options), program, batches)  # type: ignore[arg-type]


def only(program: Program, batches: Batches, **options: object) -> tuple[Action, Program]:
    plan = planned(program, batches, **options)
    assert len(plan.actions) == 1, plan
    after = rewrite.apply(program, plan.actions)
    check_rules(after)
    return plan.actions[0], after


MHA = Attending(edit=alike({1: 0, 3: 2}))
KINDS = {
    "plain": MHA,
    "fused": replace(MHA, fused=True),
    "cache": replace(MHA, cache=True),
    "fused, cache": replace(MHA, fused=True, cache=True),
    "rotary, norms": replace(MHA, rotary=True, norms=True, bias=False, cache=True),
    "not causal": replace(MHA, causal=False),
    "spelled": replace(MHA, spelled=True, cache=True),
}


WIDE = ("fused, cache", "rotary, norms", "spelled")


@pytest.mark.parametrize(
    ("kind", "layout"), [*((k, "gather") for k in KINDS), *((k, "wide") for k in WIDE)]
)
def test_equal_heads_share_scores_and_nothing_changes(kind: str, layout: str) -> None:
    what = KINDS[kind]
    program, batches = what.program(), what.batches()
    target = "layers.0.attention@2"
    action, after = only(program, batches, only=(target,), layout=layout)
    assert action.loss is not None
    assert action.loss < 1e-10
    assert action.target == target
    check_same(program, after, batches)
    before, now = total_cost(program), total_cost(after)
    assert before.parameters - now.parameters == action.saving["parameters"]
    assert before.bytes - now.bytes == action.saving["bytes"]
    assert before.flops(DEFAULT_SIZES) - now.flops(DEFAULT_SIZES) == action.saving["flops"]
    if what.cache:
        keys = 2 * DIM * 4  # representatives x head_dim x bytes
        assert now.kv_bytes_per_token == keys + 4 * DIM * 4
        assert action.saving["kv_bytes_per_token"] == keys


def test_equal_heads_are_a_rung_of_every_ladder() -> None:
    program = MHA.program()
    plan = planned(program, MHA.batches(), shares=())
    free = plan.actions[0]
    assert free.target == "layers.0.attention@2"
    assert free.loss is not None
    assert free.loss < 1e-10
    assert free.place == "layers.0.attention/heads"


@pytest.mark.parametrize("repeats", ["expand", "op"])
def test_queries_of_one_key_head_that_agree_are_one(repeats: str) -> None:
    what = Attending(keys=2, cache=True, repeats=repeats, edit=alike({1: 0, 3: 2}, grouped=True))
    program, batches = what.program(), what.batches()
    action, after = only(program, batches, only=("layers.0.attention@2",))
    assert action.loss is not None
    assert action.loss < 1e-10
    check_same(program, after, batches)
    assert total_cost(after).kv_bytes_per_token == total_cost(program).kv_bytes_per_token
    assert action.saving["parameters"] == 2 * (2 * DIM * 32 + DIM)


@pytest.mark.parametrize(
    ("repeats", "layout"), [("expand", "gather"), ("expand", "wide"), ("op", "gather")]
)
def test_a_key_head_goes_when_its_queries_share_anothers(repeats: str, layout: str) -> None:
    def edit(weights: dict[str, Tensor], layer: int) -> None:
        for name, size in (("q", 2 * DIM), ("qb", 2 * DIM), ("k", DIM), ("kb", DIM)):
            weights[name][size : 2 * size] = weights[name][:size]

    what = Attending(keys=2, cache=True, rotary=True, repeats=repeats, edit=edit)
    program, batches = what.program(), what.batches()
    action, after = only(program, batches, only=("layers.0.attention@2",), layout=layout)
    assert action.loss is not None
    assert action.loss < 1e-10
    assert action.evidence["key_heads"] == 1
    check_same(program, after, batches)
    assert total_cost(program).kv_bytes_per_token == 4 * DIM * 4
    assert total_cost(after).kv_bytes_per_token == 3 * DIM * 4


def test_multi_query_heads_that_agree_are_one() -> None:
    what = Attending(keys=1, cache=True, edit=alike({3: 1}, grouped=True))
    program, batches = what.program(), what.batches()
    _, after = only(program, batches, only=("layers.0.attention@3",))
    check_same(program, after, batches)


@pytest.mark.parametrize(("count", "keys"), [(1, 4), (3, 2), (3, 4)])
def test_any_count_runs_on_an_attention_with_nothing_alike(count: int, keys: int) -> None:
    what = Attending(keys=keys, cache=True, spelled=keys == 4)
    program, batches = what.program(), what.batches()
    target = f"layers.0.attention@{count}"
    action, after = only(program, batches, only=(target,))
    rough, _ = only(program, batches, only=(target,), refit=False)
    assert action.loss is not None
    assert rough.loss is not None
    assert 1e-6 < action.loss <= rough.loss == action.evidence["unfitted"]
    assert len(after(**_filled(after, batches))) == 3


def _filled(program: Program, batches: Batches) -> dict[str, Tensor]:
    from redpass.verify.inputs import complete

    return complete(program, batches[0])


def test_masks_with_a_place_for_each_head_follow() -> None:
    what = Attending(position_bias=True, edit=alike({2: 1, 3: 1}))
    program, batches = what.program(), what.batches()
    found = Facts(program, batches).get(head_similarity)["layers.0.attention"]
    # equal queries and keys, but positions tell them apart
    assert equal_count(1 - found.correlations) == 4
    action, after = only(program, batches, only=("layers.0.attention@2",), refit=False)
    check_rules(after)
    assert action.loss is not None
    assert action.loss > 1e-6
    # The predicted loss is the error that the rewritten program really has.
    off = sum(float((after(**b)[0] - program(**b)[0]).square().sum()) for b in batches)
    size = sum(float(program(**b)[0].square().sum()) for b in batches)
    assert action.loss == pytest.approx(off / size, rel=1e-3)


def test_the_lowered_op_is_found_for_both_layouts() -> None:
    for layout in ("gather", "wide"):
        program, batches = MHA.program(), MHA.batches()
        _, after = only(program, batches, only=("layers.0.attention@2",), layout=layout)
        sites = [s for s in find(after, structure(after)) if isinstance(s, Site)]
        assert len(sites) == 1


def test_probabilities_are_those_of_the_core() -> None:
    for spelled in (False, True):
        what = Attending(spelled=spelled, cache=True)
        program, batches = what.program(), what.batches(1)
        found = Facts(program, batches).get(head_similarity)["layers.0.attention"]
        weights, batch = what.weights(0), batches[0]
        x = batch["x"]
        q, k = (
            (x @ weights[n].T + weights[f"{n}b"]).unflatten(-1, (4, DIM)).transpose(1, 2)
            for n in "qk"
        )
        scores = q @ k.transpose(-1, -2) * DIM**-0.5 + batch["bias"]
        rows = scores.softmax(-1).double()
        seen = (torch.arange(9) + 1.0)[:, None]
        centred = torch.where(torch.arange(9) < seen, rows - 1 / seen, 0.0)
        flat = centred.transpose(0, 1).flatten(1)
        assert torch.allclose(torch.tensor(found.gram).double(), flat @ flat.T, atol=1e-4)
        assert found.rows == 4 * 9
        v = (x @ weights["v"].T + weights["vb"]).unflatten(-1, (4, DIM)).transpose(1, 2)
        columns = weights["o"].unflatten(-1, (4, DIM))
        given = torch.einsum("bgst,bhtd,ohd->bghso", rows.float(), v, columns).double()
        own = given.diagonal(dim1=1, dim2=2).permute(0, 3, 1, 2)
        off = (given - own[:, None]).square().sum((0, 3, 4)).T
        usual = own.square().sum((0, 2, 3)).mean()
        assert torch.allclose(found.distances, off / usual, rtol=1e-3, atol=1e-6)


def test_clusters_by_hand() -> None:
    points = torch.tensor([0.0, 0.1, 1.0, 1.1, 5.0, 5.05], dtype=torch.float64)
    alikeness = 1 - (points[:, None] - points).abs() / 10
    found = clusters(1 - alikeness, 3)
    assert found.members == ((0, 1), (2, 3), (4, 5))
    assert found.representatives == (0, 2, 4)
    assert clusters(1 - alikeness, 2).members == ((0, 1, 2, 3), (4, 5))
    assert elbow([10.0, 3.0, 0.5, 0.4, 0.2, 0.0]) == 3
    drawn = random_clusters(found, 1 - alikeness, 1)
    assert sorted(map(len, drawn.members)) == [2, 2, 2]
    assert drawn.error >= found.error


def test_what_cannot_be_cut_is_told() -> None:
    reasons = {
        "gate": "joins heads with a value that has a place for each",
        "wide norm": "normalises over heads together",
    }
    for extra, reason in reasons.items():
        what = Attending(extra=extra)
        plan = planned(what.program(), what.batches())
        assert not plan.actions
        assert [skip.target for skip in plan.skips] == ["layers.0.attention"]
        assert reason in plan.skips[0].reason


def test_bad_requests_are_refused_before_any_work() -> None:
    program = MHA.program()
    for options, text in (
        ({"only": ("layers.7.attention",)}, "no attention is called"),
        ({"only": ("layers.0.attention@4",)}, "no count of heads"),
        ({"only": ("layers.0.attention@x",)}, "no count of heads"),
        ({"shares": (1.5,)}, "a share of 1.5"),
        ({"layout": "tall"}, "no layout is called"),
    ):
        with pytest.raises(UsageError, match=text):
            planned(program, None, **options)
    with pytest.raises(DataError, match="no data"):
        planned(program, None)
    with pytest.raises(DataError, match="two calibration batches"):
        planned(program, MHA.batches(1))
