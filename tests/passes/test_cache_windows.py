"""Caches with a window of tokens in full: the rule on pairs of tokens, however calls are cut."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from building import Builder, aten
from caching import decode, language_model, plan_with
from torch import Tensor

import redpass
from redpass import rewrite
from redpass.analysis.caches.parts import Factors
from redpass.analysis.caches.windows import turned
from redpass.analysis.cost import total_cost
from redpass.data import Batches, Splits
from redpass.errors import DataError, PassError, UsageError
from redpass.facts import Facts
from redpass.passes.cache_latents import CacheLatents
from redpass.passes.drop_branches import DropBranches
from redpass.passes.drop_key_channels import DropKeyChannels
from redpass.passes.spec import format_pass, parse_passes
from redpass.plan import Action, Plan
from redpass.program import Program
from redpass.recipe import replay
from redpass.verify.rules import check_rules

WINDOW = 5
IDS = torch.randint(3, 64, (2, 20), generator=torch.Generator().manual_seed(5))
CUTS = ((20,), (3, 1, 1, 9, 6), (1,) * 20)
GROUPED: dict[str, Any] = {"group_size": 2, "keys": "rebuilt"}
CASES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("gpt2", {}),
    ("llama", {}),
    ("llama", GROUPED),
    ("qwen3", {"keys": "rebuilt"}),
    ("gpt_neox", {}),
)


def made(name: str, share: float, form: dict[str, Any]) -> Program:
    return _made(name, share, tuple(form.items()))


@cache
def _made(name: str, share: float, form: tuple[tuple[str, Any], ...]) -> Program:
    after, plan = cut(language_model(name), shares=(share,), **dict(form))
    assert len(plan.actions) == 4, plan.skips
    return after


def cut(program: Program, **options: Any) -> tuple[Program, Plan]:
    plan = plan_with(CacheLatents(multiple=1, **{"window": WINDOW, **options}), program)
    return rewrite.apply(program, plan.actions), plan


def off(before: Tensor, after: Tensor) -> float:
    return float((before - after).norm() / before.norm())


@pytest.mark.parametrize(("name", "form"), CASES, ids=str)
def test_full_rank_gives_what_the_model_gave(name: str, form: dict[str, Any]) -> None:
    program, after = language_model(name), made(name, 1.0, form)
    check_rules(after, paranoid=True)
    for padding in (0, 3):
        before = decode(program, IDS, CUTS[0], padding)[0]
        for calls in CUTS:
            assert off(before, decode(after, IDS, calls, padding)[0]) < 1e-5


@pytest.mark.parametrize(("name", "form"), CASES, ids=str)
def test_calls_may_be_cut_anywhere(name: str, form: dict[str, Any]) -> None:
    program, after = language_model(name), made(name, 0.5, form)
    for padding in (0, 3):
        whole = decode(after, IDS, CUTS[0], padding)[0]
        assert off(decode(program, IDS, CUTS[0], padding)[0], whole) > 1e-3
        for calls in (*CUTS[1:], (WINDOW, 2 * WINDOW, WINDOW), (WINDOW + 1, 13, 1)):
            assert off(whole, decode(after, IDS, calls, padding)[0]) < 1e-5


def test_what_lies_within_the_window_is_read_in_full() -> None:
    program = language_model("llama")
    after, _ = cut(program, ranks=(1,), window=16)
    short = IDS[:, :17]
    before = decode(program, short, (17,))[0]
    for calls in ((17,), (9, 8), (1,) * 17):
        assert off(before, decode(after, short, calls)[0]) < 1e-5
    longer = decode(program, IDS, (20,))[0], decode(after, IDS, (20,))[0]
    assert off(*(part[:, :17] for part in longer)) < 1e-5
    assert off(*(part[:, 17:] for part in longer)) > 1e-3


def test_the_larger_the_window_the_less_is_lost() -> None:
    program = language_model("gpt2")
    before = decode(program, IDS, (20,))[0]
    lost = [
        off(before, decode(cut(program, shares=(0.25,), window=window)[0], IDS, (20,))[0])
        for window in (0, 4, 12)
    ]
    assert lost[0] > lost[1] > lost[2] > 0


def test_the_window_is_counted_apart_from_what_grows() -> None:
    program = language_model("llama")
    after, plan = cut(program, shares=(0.5,))
    costs = [total_cost(p) for p in (program, after)]
    assert costs[1].kv_bytes_per_token * 2 == costs[0].kv_bytes_per_token
    assert sum(a.saving["kv_bytes_per_token"] for a in plan.actions) == costs[1].kv_bytes_per_token
    assert costs[0].state_bytes == 0
    assert costs[1].state_bytes == WINDOW * costs[0].kv_bytes_per_token
    saved = sum(a.saving["parameters"] for a in plan.actions)
    assert saved == costs[0].parameters - costs[1].parameters


@pytest.mark.parametrize("count", [2, WINDOW, 20])
def test_the_window_holds_as_many_tokens_as_there_are(count: int) -> None:
    after = made("llama", 0.5, {})
    state = decode(after, IDS, (count,))[1]
    sizes = {name.rpartition(".")[2]: list(value.shape) for name, value in state.items()}
    held = min(count, WINDOW)
    assert sizes == {
        "key": [2, 2, count, 4], "key_recent": [2, 2, held, 8],
        "value": [2, 2, count, 4], "value_recent": [2, 2, held, 8],
    }  # fmt: skip


def test_keys_and_values_go_alone_and_in_any_order() -> None:
    program = language_model("gpt2")
    actions = cut(program, shares=(0.5,))[1].actions
    sides = [[a for a in actions if a.place.endswith(kind)] for kind in ("keys", "values")]
    for side in sides:
        after = applied(program, side)
        assert len(after.signature.state) == 6
        whole, *others = (decode(after, IDS, calls)[0] for calls in CUTS)
        assert all(off(whole, other) < 1e-5 for other in others)
    both = [applied(program, [*a, *b]) for a, b in (sides, sides[::-1])]
    assert off(*(decode(after, IDS)[0] for after in both)) < 1e-5


def applied(program: Program, actions: list[Action]) -> Program:
    after = rewrite.apply(program, actions)
    check_rules(after, paranoid=True)
    return after


def test_a_dropped_attention_takes_its_window_along() -> None:
    program = language_model("gpt2")
    actions = list(cut(program, shares=(0.5,))[1].actions)
    drop = list(DropBranches(only=("layers.1.attention",)).plan(program, Facts(program)).actions)
    for order in (actions + drop, drop + actions):
        after = applied(program, order)
        names = {name for pair in after.signature.state for name in pair}
        assert len(after.signature.state) == 4
        assert names < {p.name for p in (*after.signature.inputs, *after.signature.outputs)}
        whole, *others = (decode(after, IDS, calls)[0] for calls in CUTS)
        assert all(off(whole, other) < 1e-5 for other in others)


def test_other_cuts_of_the_same_attention_are_right_or_refused() -> None:
    program = language_model("gpt2")
    ours = {w: cut(program, shares=(0.5,), window=w)[1].actions for w in (WINDOW, 7)}
    keys, values = (
        [a for a in ours[WINDOW] if a.place.endswith(kind)] for kind in ("keys", "values")
    )
    channels = plan_with(DropKeyChannels(shares=(0.5,), multiple=1), program).actions
    both = applied(program, [*values, *channels])
    whole, *others = (decode(both, IDS, calls)[0] for calls in CUTS)
    assert all(off(whole, other) < 1e-5 for other in others)
    others = [a for a in ours[7] if a.place.endswith("values")]
    for order in ([*keys, *others], [*others, *keys]):
        with pytest.raises(PassError):
            rewrite.apply(program, order)


def test_a_run_keeps_its_window_and_replays() -> None:
    program = language_model("llama")
    data = Splits(*(rows(seed) for seed in range(3)))
    pass_ = CacheLatents(shares=(0.5,), multiple=1, window=WINDOW)
    asked = replace(pass_, only=("layers.0.attention/keys@4", "layers.0.attention/values@4"))
    result = redpass.optimize(program, (asked,), budget="kl<=9,kv_bytes_per_token<=-20%", data=data)
    assert len(result.program.signature.state) == 6
    assert [str(n.target) for n in result.program.graph.nodes].count("aten.lt.Tensor") <= 2
    whole, *others = (decode(result.program, IDS, calls)[0] for calls in CUTS)
    assert all(off(whole, other) < 1e-5 for other in others)
    again = replay(program, result.record.recipe, data=data.calibration)
    assert again.signature == result.program.signature
    assert off(whole, decode(again, IDS, CUTS[0])[0]) < 1e-6
    assert parse_passes(format_pass(asked)) == (asked,)


def rows(seed: int) -> Batches:
    drawn = torch.randint(3, 64, (2, 32), generator=torch.Generator().manual_seed(seed))
    batch = {"input_ids": drawn, "attention_mask": torch.ones_like(drawn)}
    return Batches((batch, {**batch, "input_ids": drawn.flip(0)}), f"rows {seed}")


@pytest.mark.parametrize("window", [-1, 2.5, True, "8"])
def test_what_is_no_count_of_tokens_is_refused(window: Any) -> None:
    with pytest.raises(UsageError, match="window="):
        plan_with(CacheLatents(window=window), language_model("llama"))


def test_rows_that_hardly_leave_the_window_are_refused() -> None:
    with pytest.raises(DataError, match="rows of at most 32 tokens, and a window of 17"):
        plan_with(CacheLatents(window=17), language_model("llama"))


def test_attention_spelled_out_is_left_alone() -> None:
    plan = plan_with(CacheLatents(window=4, multiple=1), language_model("bloom"))
    assert not plan.actions
    assert {s.reason for s in plan.skips} == {
        "its attention is no fused op on queries split by heads"
    }


HEADS, WIDTH = 2, 4


def attention(mask: str, **options: Any) -> Program:
    """One branch with a cache, and a mask that is added, or none."""
    torch.manual_seed(0)
    b, size = Builder(), HEADS * WIDTH
    x = b.input("x", "batch", "seq", size)
    given = [b.input("mask", "batch", 1, "seq", "past + seq")] if mask else []
    kept = [b.input(f"past_{kind}", "batch", HEADS, "past", WIDTH) for kind in "kv"]
    batch, seq = (b.call(aten.sym_size.int, x, axis) for axis in (0, 1))
    heads = []
    for kind in "qkv":
        flat = b.call(aten.linear.default, x, b.weight(kind, torch.randn(size, size)))
        split = b.call(aten.view.default, flat, [batch, seq, HEADS, WIDTH])
        heads.append(b.call(aten.transpose.int, split, 1, 2))
    joined = [b.call(aten.cat.default, [kept[i], heads[i + 1]], 2) for i in range(2)]
    op = aten.scaled_dot_product_attention.default
    named = {"attn_mask": given[0]} if mask == "by name" else {}
    placed = given if mask == "in place" else []
    y = b.call(op, heads[0], *joined, *placed, **named, **options)
    flat = b.call(aten.reshape.default, b.call(aten.transpose.int, y, 1, 2), [batch, seq, size])
    out = b.call(aten.linear.default, flat, b.weight("o", torch.randn(size, size)))
    pairs = (("past_k", "present_k"), ("past_v", "present_v"))
    return b.program(b.call(aten.add.Tensor, x, out), *joined, state=pairs)


def calls(program: Program, x: Tensor, counts: tuple[int, ...]) -> Tensor:
    ports = {port.name: port.shape for port in program.signature.inputs}
    state = {
        name: torch.zeros(len(x), int(ports[name][1]), 0, int(ports[name][3]))
        for name, _ in program.signature.state
    }
    names, found, at = [port.name for port in program.signature.outputs], [], 0
    for part in x.split(counts, 1):
        given = {"x": part}
        if "mask" in ports:
            rows = torch.arange(at, at + part.shape[1]).unsqueeze(1)
            later = torch.arange(at + part.shape[1]) > rows
            hidden = torch.where(later, torch.finfo(torch.float32).min, 0.0)
            given["mask"] = hidden.expand(len(x), 1, -1, -1).contiguous()
        values = dict(zip(names, program(**given, **state), strict=True))
        state = {a: values[b] for a, b in program.signature.state}
        found.append(values["out0"])
        at += part.shape[1]
    return torch.cat(found, 1)


@pytest.mark.parametrize("mask", ["", "in place", "by name"])
def test_masks_that_are_added_and_none_at_all(mask: str) -> None:
    program = attention(mask)
    x = torch.randn(3, 14, HEADS * WIDTH, generator=torch.Generator().manual_seed(1))
    item = {"x": x} | ({"mask": torch.zeros(3, 1, 14, 14)} if mask else {})
    cuts = ((14,), (5, 1, 1, 7)) if mask else ((1,) * 14,)
    for share in (1.0, 0.5):
        pass_ = CacheLatents(shares=(share,), multiple=1, window=3)
        plan = pass_.plan(program, Facts(program, Batches((item,), "random")))
        assert len(plan.actions) == 2, plan.skips
        after = applied(program, list(plan.actions))
        found = [calls(after, x, counts) for counts in cuts]
        assert all(off(found[0], other) < 1e-5 for other in found)
        assert (off(calls(program, x, cuts[0]), found[0]) < 1e-5) == (share == 1)


def test_attention_that_makes_its_own_mask_is_left_alone() -> None:
    program = attention("", is_causal=True)
    data = Batches(({"x": torch.randn(3, 14, HEADS * WIDTH)},), "random")
    plan = CacheLatents(window=3, multiple=1).plan(program, Facts(program, data))
    assert {s.reason for s in plan.skips} == {
        "its attention makes its mask by itself, or drops weights"
    }


def test_a_basis_begins_with_what_latents_give_back() -> None:
    generator = torch.Generator().manual_seed(0)
    down = torch.randn(3, 2, 6, dtype=torch.float64, generator=generator)
    up = torch.randn(3, 6, 2, dtype=torch.float64, generator=generator)
    up[0, :, 1] = 0.0
    up[1, :, 1] = 1e6 * up[1, :, 0]
    latent, basis = turned(Factors(down, up))
    assert torch.allclose(latent.up @ latent.down, up @ down)
    assert torch.allclose(basis.up @ basis.down, torch.eye(6, dtype=torch.float64))
    assert torch.allclose(basis.down @ latent.up, torch.eye(6, dtype=torch.float64)[:, :2])
