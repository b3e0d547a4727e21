"""Key and value heads equal up to a turn become one for nothing; caches are half as large."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from attending import DIM, Attending, check_same
from checking import plan_pass
from torch import Tensor

from redpass import rewrite
from redpass.analysis.cost import total_cost
from redpass.analysis.heads.alignment import equal_parts, turn
from redpass.analysis.inspection import DEFAULT_SIZES
from redpass.data import Batches
from redpass.errors import DataError, UsageError
from redpass.passes.cluster_heads import ClusterHeads
from redpass.passes.merge_key_value_heads import MergeKeyValueHeads
from redpass.passes.prune_heads import PruneHeads
from redpass.plan import Pass, Plan
from redpass.program import Program
from redpass.verify.inputs import complete
from redpass.verify.rules import check_rules


def planned(program: Program, batches: Batches | None, **options: object) -> Plan:
    return plan_pass(MergeKeyValueHeads(**options), program, batches)  # type: ignore[arg-type]


def drawn_turn(kind: str, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return turn(torch.randn(DIM, DIM, generator=generator).double(), kind).float()


def turned(kind: str):  # type: ignore[no-untyped-def]
    """Makes key and value heads 2 and 3 turned copies of 0 and 1."""

    def edit(weights: dict[str, Tensor], layer: int) -> None:
        for head in (2, 3):
            new, old = (slice(h * DIM, (h + 1) * DIM) for h in (head, head - 2))
            for name, how in (("k", kind), ("v", "any")):
                by = drawn_turn(how, head)
                weights[name][new] = by @ weights[name][old]
                weights[f"{name}b"][new] = by @ weights[f"{name}b"][old]

    return edit


KINDS = {
    "free": Attending(cache=True, edit=turned("any")),
    "fused": Attending(cache=True, fused=True, edit=turned("any")),
    "spelled": Attending(spelled=True, cache=True, edit=turned("any")),
    "grouped": Attending(heads=8, keys=4, cache=True, edit=turned("any")),
    "grouped, op": Attending(heads=8, keys=4, cache=True, repeats="op", edit=turned("any")),
    "rotary": Attending(rotary=True, cache=True, edit=turned("halves")),
    "norms": Attending(norms=True, bias=False, cache=True, edit=turned("none")),
}


@pytest.mark.parametrize("kind", KINDS)
def test_heads_equal_up_to_a_turn_are_merged_for_nothing(kind: str) -> None:
    what = KINDS[kind]
    program, batches = what.program(), what.batches(4)
    plan = planned(program, batches, only=("layers.0.attention@2",))
    action = plan.actions[0]
    assert action.loss is not None
    assert action.loss < 1e-10
    assert "0+2, 1+3" in action.reason
    after = rewrite.apply(program, plan.actions)
    check_rules(after)
    check_same(program, after, batches)
    before, now = total_cost(program), total_cost(after)
    assert now.kv_bytes_per_token == 2 * 2 * DIM * 4 == before.kv_bytes_per_token // 2
    assert action.saving["kv_bytes_per_token"] == now.kv_bytes_per_token
    assert before.parameters - now.parameters == action.saving["parameters"]
    assert before.flops(DEFAULT_SIZES) - now.flops(DEFAULT_SIZES) == action.saving["flops"]


def test_aligned_heads_lose_less_than_unaligned_ones_and_fitted_less_than_not() -> None:
    what = Attending(heads=8, keys=8, edit=None)
    program, batches = what.program(), what.batches(6, rows=8)
    target = ("layers.0.attention@4",)

    def loss(**options: object) -> float:
        return planned(program, batches, only=target, **options).actions[0].loss or 0.0

    assert loss(refit=False) < 0.98 * loss(refit=False, align=False)
    assert loss() < 0.95 * loss(refit=False)


def test_a_free_turn_is_not_taken_where_rotary_forbids_it() -> None:
    what = replace(KINDS["rotary"], edit=turned("any"))
    program, batches = what.program(), what.batches(4)
    action = planned(program, batches, only=("layers.0.attention@2",)).actions[0]
    assert "turned in rotary planes" in action.reason
    assert action.loss is not None
    assert action.loss > 1e-6  # and what is lost is told


@pytest.mark.parametrize(
    ("first", "keys"), [(ClusterHeads, 4), (PruneHeads, 2), (MergeKeyValueHeads, 4)]
)
def test_rewritten_attentions_can_be_looked_at_again(first: type[Pass], keys: int) -> None:
    what = Attending(keys=keys, cache=True)
    program, batches = what.program(), what.batches(2)
    for _ in range(2):
        plan = plan_pass(first(), program, batches)
        program = rewrite.apply(program, plan.actions[:1])
        check_rules(program)
        for again in (ClusterHeads(shares=(0.5,)), PruneHeads(shares=(0.5,)), first()):
            plan = plan_pass(again, program, batches)
            assert plan.actions or plan.skips
            for action in plan.actions:
                after = rewrite.apply(program, [action])
                check_rules(after)
                saved = total_cost(program).parameters - total_cost(after).parameters
                assert saved == action.saving["parameters"]
                # What is predicted is what happens: the one attention writes to the output.
                off = size = 0.0
                for batch in batches:
                    old = program(**complete(program, batch))[0]
                    new = after(**complete(after, batch))[0]
                    off += float((old - new).square().sum())
                    size += float(old.square().sum())
                assert action.loss == pytest.approx(off / size, rel=1e-2, abs=1e-9)


def test_parts_of_one_size() -> None:
    points = torch.tensor([0.0, 5.0, 0.1, 5.1, 9.0, 9.2], dtype=torch.float64)
    assert equal_parts((points[:, None] - points).abs(), 3) == ((0, 2), (1, 3), (4, 5))


def test_bad_requests_are_refused() -> None:
    what = Attending()
    program, batches = what.program(), what.batches(2)
    with pytest.raises(UsageError, match="4 key heads cannot be merged to 3 evenly"):
        planned(program, batches, only=("layers.0.attention@3",))
    with pytest.raises(DataError, match="no data"):
        planned(program, None)
    one = Attending(keys=1)
    plan = planned(one.program(), one.batches(2))
    assert not plan.actions
    assert plan.skips[0].reason == "it has no key heads that can be merged evenly"
