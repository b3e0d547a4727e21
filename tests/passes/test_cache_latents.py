"""Caches that keep latents: full rank changes nothing, less is kept, planted ranks are found."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from building import aten
from caching import decode, language_model, module, plan_with, texts
from torch import Tensor

import redpass
from redpass import rewrite
from redpass.analysis.cost import total_cost
from redpass.errors import DataError, UsageError
from redpass.facts import Facts
from redpass.passes.cache_latents import CacheLatents
from redpass.passes.drop_branches import DropBranches
from redpass.passes.spec import format_pass, parse_passes
from redpass.plan import Action, Insert, Plan, Ref, Replace
from redpass.program import Program
from redpass.verify.rules import check_rules

IDS = torch.randint(3, 64, (3, 12), generator=torch.Generator().manual_seed(5))
GROUPED = {"group_size": 2, "keys": "rebuilt", "refit": False}
CASES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("gpt2", {}),
    ("llama", {"keys": "rebuilt"}),
    ("llama", {"group_size": 2}),
    ("qwen3", {}),
    ("qwen3", GROUPED),
    ("gpt_neox", {}),
    ("gpt_neox", GROUPED),
)


def cut(program: Program, **options: Any) -> tuple[Program, Plan]:
    plan = plan_with(CacheLatents(multiple=1, **options), program)
    after = rewrite.apply(program, plan.actions)
    check_rules(after)
    return after, plan


def off(before: Tensor, after: Tensor) -> float:
    return float((before - after).norm() / before.norm())


@pytest.mark.parametrize(("name", "form"), CASES, ids=str)
def test_full_rank_gives_what_the_model_gave_call_by_call(name: str, form: dict[str, Any]) -> None:
    program = language_model(name)
    after, plan = cut(program, shares=(1.0,), **form)
    assert len(plan.actions) == 4
    assert not plan.skips
    check_rules(after, paranoid=True)
    for padding in (0, 3):
        before = decode(program, IDS, padding=padding)[0]
        assert off(before, decode(after, IDS, padding=padding)[0]) < 1e-5


@pytest.mark.parametrize(("name", "form"), CASES, ids=str)
def test_half_the_rank_is_half_the_cache(name: str, form: dict[str, Any]) -> None:
    program = language_model(name)
    after, plan = cut(program, shares=(0.5,), **form)
    caches = [decode(p, IDS)[1] for p in (program, after)]
    size = [sum(t.numel() * t.element_size() for t in kept.values()) for kept in caches]
    assert size[1] * 2 == size[0]
    costs = [total_cost(p) for p in (program, after)]
    assert costs[1].kv_bytes_per_token * 2 == costs[0].kv_bytes_per_token
    saved = sum(action.saving["kv_bytes_per_token"] for action in plan.actions)
    assert saved == costs[1].kv_bytes_per_token


def test_weights_are_saved_as_predicted_where_projections_are_apart() -> None:
    program = language_model("llama")
    for action in cut(program, shares=(0.5,), keys="rebuilt")[1].actions:
        after = rewrite.apply(program, [action])
        saved = total_cost(program).parameters - total_cost(after).parameters
        assert saved == action.saving["parameters"]


@pytest.mark.parametrize("keys", ["projected", "rebuilt"])
def test_positions_that_do_not_start_at_zero_are_taken_as_given(keys: str) -> None:
    program = language_model("llama")
    after, _ = cut(program, shares=(1.0,), keys=keys)
    cache = {name: torch.zeros(3, 2, 0, 8) for name, _ in program.signature.state}
    shifted = torch.arange(7, 13).expand(3, -1).contiguous()
    shifted[1] = torch.tensor([0, 5, 6, 20, 21, 22])
    given = {"input_ids": IDS[:, :6], "attention_mask": torch.ones(3, 6, dtype=torch.int64)}
    old, new = (p(**given, position_ids=shifted, **cache)[0] for p in (program, after))
    assert off(old, new) < 1e-5


def test_better_directions_lose_less() -> None:
    program = language_model("gpt2")
    before = decode(program, IDS)[0]
    measured, predicted = {}, {}
    for basis in ("outputs", "activations", "weights", "random"):
        refit = basis in ("outputs", "activations")
        after, plan = cut(program, shares=(0.5,), basis=basis, refit=refit)
        measured[basis] = off(before, decode(after, IDS)[0])
        predicted[basis] = sum(action.loss or 0.0 for action in plan.actions)
    for figures in (measured, predicted):
        assert figures["outputs"] < figures["activations"] < figures["random"]
        assert figures["outputs"] < figures["weights"] < figures["random"]


def test_losses_rise_as_less_is_kept() -> None:
    plan = plan_with(CacheLatents(multiple=2), language_model("llama"))
    ladders: dict[str, list[Action]] = {}
    for action in plan.actions:
        ladders.setdefault(action.place, []).append(action)
    assert len(ladders) == 4
    for place, rungs in ladders.items():
        assert [a.target for a in rungs] == [f"{place}@{rank}" for rank in (6, 4, 2)]
        losses = [a.loss or 0.0 for a in rungs]
        assert 0 < losses[0] < losses[1] < losses[2] < 1


def planted(rank: int) -> Program:
    """A model whose first keys and values have `rank` numbers in each head."""
    model = module("llama")
    attention = model.model.layers[0].self_attn  # type: ignore[union-attr, index]
    generator = torch.Generator().manual_seed(2)
    for linear in (attention.k_proj, attention.v_proj):  # type: ignore[union-attr]
        up = torch.randn(2, 8, rank, generator=generator)
        down = torch.randn(2, rank, 32, generator=generator)
        linear.weight.data = 0.1 * (up @ down).flatten(0, 1)  # type: ignore[union-attr]
    return redpass.load(model)


def test_planted_ranks_are_found_and_cost_nothing() -> None:
    program = planted(3)
    after, plan = cut(program, ranks=(3,), keys="rebuilt")
    losses = {action.place: action.loss or 0.0 for action in plan.actions}
    for kind in ("keys", "values"):
        assert losses[f"layers.0.attention/{kind}"] < 1e-10 < 1e-4
        assert losses[f"layers.1.attention/{kind}"] > 1e-4
    free = [action for action in plan.actions if action.place.startswith("layers.0.")]
    after = rewrite.apply(program, free)
    assert off(decode(program, IDS)[0], decode(after, IDS)[0]) < 1e-5


def test_caches_of_an_attention_compose_in_any_order_and_with_dropped_branches() -> None:
    program = language_model("gpt2")
    actions = cut(program, shares=(0.5,), group_size=2)[1].actions
    one, other = (rewrite.apply(program, a) for a in (actions, actions[::-1]))
    assert off(decode(one, IDS)[0], decode(other, IDS)[0]) < 1e-5
    drop = DropBranches(only=("layers.1.attention",)).plan(program, Facts(program)).actions
    for order in ((*actions, *drop), (*drop, *actions)):
        after = rewrite.apply(program, order)
        check_rules(after, paranoid=True)
        assert len(after.signature.state) == 2


def test_attention_spelled_out_gets_its_keys_and_values_rebuilt() -> None:
    program = language_model("bloom")
    after, plan = cut(program, shares=(1.0,))
    assert len(plan.actions) == 4, plan.skips
    assert off(decode(program, IDS)[0], decode(after, IDS)[0]) < 1e-5


def test_only_what_is_named_is_planned_and_targets_are_stable() -> None:
    program = language_model("llama")
    asked = CacheLatents(only=("layers.1.attention/values@4",), multiple=2)
    plan = plan_with(asked, program)
    assert [a.target for a in plan.actions] == ["layers.1.attention/values@4"]
    whole = {a.target: a for a in plan_with(replace(asked, only=()), program).actions}
    again = rewrite.apply(program, [whole["layers.1.attention/values@4"]])
    assert off(decode(rewrite.apply(program, plan.actions), IDS)[0], decode(again, IDS)[0]) == 0
    assert parse_passes(format_pass(asked)) == (asked,)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"ranks": (9,)}, "give ranks from 1 to 8"),
        ({"ranks": (0,)}, "give ranks from 1 to 8"),
        ({"ranks": (17,), "group_size": 2}, "give ranks from 1 to 16"),
        ({"group_size": 3}, "give a group size of 1, 2"),
        ({"group_size": 0}, "at least 1"),
        ({"shares": (1.5,)}, "above 0 and at most 1"),
        ({"shares": (0.0,)}, "above 0 and at most 1"),
        ({"keys": "rebuild"}, "rebuilt"),
        ({"basis": "weight"}, "weights"),
        ({"only": ("layers.7.attention/keys@4",)}, "layers.1.attention/keys"),
    ],
)
def test_what_no_cache_can_be_cut_to_is_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError) as caught:
        plan_with(CacheLatents(**options), language_model("llama"))
    assert says in str(caught.value)


def test_a_model_without_a_cache_is_left_alone(residual: Program) -> None:
    plan = CacheLatents().plan(residual, Facts(residual))
    assert [skip.reason for skip in plan.skips] == [
        "the model keeps no keys and values from call to call"
    ]


def test_keys_whose_tables_come_from_elsewhere_are_left_alone() -> None:
    program = language_model("llama")
    ports = tuple(
        replace(port, name="angles") if port.name == "position_ids" else port
        for port in program.signature.inputs
    )
    renamed = replace(program, signature=replace(program.signature, inputs=ports))
    items = tuple({**b, "angles": b["attention_mask"].cumsum(1)} for b in texts().items)
    facts = Facts(renamed, replace(texts(), items=items))
    plan = CacheLatents(keys="rebuilt", shares=(0.5,), multiple=1).plan(renamed, facts)
    assert {skip.reason for skip in plan.skips} == {
        "its tables are made from the input 'angles', which kept positions have not"
    }
    assert {action.place.rpartition("/")[2] for action in plan.actions} == {"values"}


def test_keys_that_are_read_elsewhere_are_left_alone() -> None:
    program = language_model("llama")
    kept, last = (program.output_value(name) for name in ("present.0.key", "logits"))
    before = next(iter(last.users)).name
    edits = (
        Insert("total", aten.sum.default, (Ref(kept.name),), before),
        Insert("shifted", aten.add.Tensor, (Ref(last.name), Ref("total")), before),
        Replace(last.name, "shifted"),
    )
    changed = rewrite.apply(program, [Action("test", "test", edits, "")])
    plan = plan_with(CacheLatents(shares=(0.5,), multiple=1), changed)
    assert [s.target for s in plan.skips if "reads what is kept, too" in s.reason] == [
        "layers.0.attention/keys"
    ]


def test_data_are_asked_for() -> None:
    program = language_model("llama")
    with pytest.raises(DataError, match="no data was given"):
        CacheLatents().plan(program, Facts(program))
