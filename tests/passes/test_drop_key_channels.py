"""Key channels that leave the cache: which ones, what that saves, what is refused."""

from __future__ import annotations

import pytest
import torch
from caching import decode, language_model, module, plan_with

import redpass
from redpass import rewrite
from redpass.analysis.cost import total_cost
from redpass.errors import UsageError
from redpass.facts import Facts
from redpass.passes.drop_key_channels import DropKeyChannels
from redpass.program import Program
from redpass.verify.rules import check_rules

IDS = torch.randint(3, 64, (3, 12), generator=torch.Generator().manual_seed(5))


def off(before: torch.Tensor, after: torch.Tensor) -> float:
    return float((before - after).norm() / before.norm())


@pytest.mark.parametrize("name", ["gpt2", "qwen3"])
def test_all_channels_change_nothing_and_half_of_them_save_half_of_the_keys(name: str) -> None:
    program = language_model(name)
    before, kept = decode(program, IDS)
    plan = plan_with(DropKeyChannels(shares=(1.0, 0.5), multiple=1), program)
    for count, limit in ((8, 1e-5), (4, 1.0)):
        actions = [action for action in plan.actions if action.target.endswith(f"@{count}")]
        assert len(actions) == 2
        after = rewrite.apply(program, actions)
        check_rules(after, paranoid=True)
        found, left = decode(after, IDS)
        assert off(before, found) < limit
        for port, value in left.items():
            share = count / 8 if port.endswith("key") else 1
            assert value.numel() == share * kept[port].numel()
        saved = total_cost(program).kv_bytes_per_token - total_cost(after).kv_bytes_per_token
        assert saved == sum(action.saving["kv_bytes_per_token"] for action in actions)


def quiet(name: str) -> Program:
    """A model two of whose channels in every key head meet no query."""
    model = module(name)
    for layer in model.transformer.h:  # type: ignore[union-attr]
        attention = layer.attn.c_attn  # type: ignore[union-attr]
        for part in (attention.weight.data, attention.bias.data):  # type: ignore[union-attr]
            part[..., :32].unflatten(-1, (4, 8))[..., [1, 6]] = 0.0
    return redpass.load(model)


def test_channels_that_meet_no_query_go_first_and_for_free() -> None:
    program = quiet("gpt2")
    plan = plan_with(DropKeyChannels(ranks=(6,), refit=False), program)
    assert all((action.loss or 0.0) < 1e-12 for action in plan.actions)
    after = rewrite.apply(program, plan.actions)
    assert off(decode(program, IDS)[0], decode(after, IDS)[0]) < 1e-5


def test_the_product_loses_less_than_chance_and_a_refit_less_still() -> None:
    program, losses = language_model("gpt2"), {}
    for order, refit in (("product", True), ("product", False), ("random", False)):
        pass_ = DropKeyChannels(shares=(0.5,), multiple=1, order=order, refit=refit)
        losses[order, refit] = sum(a.loss or 0.0 for a in plan_with(pass_, program).actions)
    assert losses["product", True] < losses["product", False] < losses["random", False]


def test_bad_options_and_models_without_a_cache(residual: Program) -> None:
    program = language_model("gpt2")
    for options, says in (
        ({"ranks": (9,)}, "give ranks from 1 to 8"),
        ({"order": "products"}, "product"),
        ({"only": ("layers.9.attention/keys@4",)}, "layers.1"),
    ):
        with pytest.raises(UsageError) as caught:
            plan_with(DropKeyChannels(**options), program)  # type: ignore[arg-type]
        assert says in str(caught.value)
    assert len(DropKeyChannels().plan(residual, Facts(residual)).skips) == 1
