"""Narrower queries and keys under rotary positions: whole pairs, chosen for each key head."""

from __future__ import annotations

from dataclasses import replace

import attending
import pytest
import torch
from attending import DIM, Attending
from caching import decode, language_model, texts
from torch import Tensor, fx

from redpass import rewrite
from redpass.analysis.cost import total_cost
from redpass.analysis.heads.axes import Unfit
from redpass.analysis.heads.cuts import edits
from redpass.analysis.heads.widths import HeadWidths, head_shapes, head_widths
from redpass.analysis.inspection import DEFAULT_SIZES
from redpass.errors import UsageError
from redpass.facts import Facts
from redpass.passes.shrink_heads import ShrinkHeads
from redpass.plan import Action, Plan
from redpass.program import Program
from redpass.verify.rules import check_rules

LAYOUTS = ("llama", "qwen3", "gpt_neox", "gptj")
"""Halves with grouped keys; the same behind norms; some channels only; neighbours, some only."""


class _Measured(dict[str, Facts]):
    def __missing__(self, name: str) -> Facts:
        self[name] = Facts(language_model(name), texts(2))
        return self[name]


@pytest.fixture(scope="module")
def measured() -> _Measured:
    """Models that are traced and measured when they are asked for."""
    return _Measured()


def _found(facts: Facts, layer: int = 0) -> HeadWidths:
    return facts.get(head_widths)[f"layers.{layer}.attention"]


def _cut(facts: Facts, *actions: Action) -> Program:
    after = rewrite.apply(facts.program, actions)
    check_rules(after)
    return after


def _narrow(facts: Facts, width: int, *, refit: bool = True) -> Program:
    """Queries and keys of all layers."""
    actions = [
        Action("test", label, found.cut("keys", width, "activations", refit=refit)[0], "")
        for label, found in facts.get(head_widths).items()
    ]
    return _cut(facts, *actions)


def _ids() -> Tensor:
    return torch.randint(3, 64, (2, 40), generator=torch.Generator().manual_seed(5))


def _gap(after: Program, before: Program) -> float:
    new, old = (decode(program, _ids(), (40,))[0] for program in (after, before))
    return float((new - old).norm() / old.norm())


def _plan(facts: Facts, **options: object) -> Plan:
    pass_ = ShrinkHeads(**{"multiple": 1, **options})
    return pass_.plan(facts.program, facts.restrict(tuple(pass_.needs)))


@pytest.mark.parametrize("name", LAYOUTS)
def test_all_pairs_leave_the_output_as_it_is(name: str, measured: dict[str, Facts]) -> None:
    assert _gap(_narrow(measured[name], 8), measured[name].program) < 1e-5


@pytest.mark.parametrize("name", LAYOUTS)
def test_positions_stay_right_call_by_call_and_the_key_cache_is_small(
    name: str, measured: dict[str, Facts]
) -> None:
    after = _narrow(measured[name], 4)
    whole, state = decode(after, _ids(), (40,), padding=3)
    parts, again = decode(after, _ids(), (25, 1, 1, 13), padding=3)
    assert torch.allclose(whole, parts, atol=2e-5)
    widths = {port: value.shape[-1] for port, value in state.items()}
    assert {port.rpartition(".")[2]: width for port, width in widths.items()} == {
        "key": 4,
        "value": 8,
    }
    assert all(again[port].shape == value.shape for port, value in state.items())
    assert 1e-4 < _gap(after, measured[name].program) < 1.0


def _with_pairs_times(program: Program, sides: tuple[str, ...], factor: float) -> Program:
    """One pair of every head is smaller, another one in each."""
    weights = dict(program.weights)
    for layer in (0, 1):
        for side in sides:
            name = f"model.layers.{layer}.self_attn.{side}_proj.weight"
            heads = weights[name].clone().unflatten(0, (-1, 8))
            for head in range(len(heads)):
                dead = head * 2 // len(heads) + layer
                heads[head, [dead, dead + 4]] *= factor
            weights[name] = heads.flatten(0, 1)
    return replace(program, weights=weights)


@pytest.mark.parametrize(("name", "sides"), [("llama", ("k",)), ("qwen3", ("q", "k"))])
def test_planted_dead_pairs_of_each_head_are_found_and_cost_nothing(
    name: str, sides: tuple[str, ...]
) -> None:
    """Behind a norm a pair must give nothing on both sides: else the norm is another one."""
    facts = Facts(_with_pairs_times(language_model(name), sides, 0.0), texts(2))
    plan = _plan(facts, shares=(0.75,))
    actions = [a for a in plan.actions if a.target.endswith("keys@6")]
    assert [a.loss for a in actions] == pytest.approx([0.0, 0.0], abs=1e-9)
    assert {a.target for a in actions} == {f"layers.{n}.attention.keys@6" for n in (0, 1)}
    assert _gap(_cut(facts, *actions), facts.program) < 2e-5


def test_chosen_pairs_beat_random_ones() -> None:
    """One pair of each head is weak, another one in each; measured and as predicted."""
    facts = Facts(_with_pairs_times(language_model("llama"), ("k",), 0.2), texts(2))
    found = _found(facts)
    assert found.keys is not None
    orders = found.keys.bases("activations")
    chosen, least = found.keys.cut(orders, 6, refit=True)
    generator = torch.Generator().manual_seed(0)
    gaps = []
    for _ in range(3):
        mixed = [
            replace(o, planes=o.planes[torch.randperm(len(o.planes), generator=generator)])
            for o in orders
        ]
        cut, loss = found.keys.cut(mixed, 6, refit=True)
        assert least <= loss
        gaps.append(_error(facts, found, cut))
    assert _error(facts, found, chosen) < 0.6 * sum(gaps) / len(gaps)
    assert found.keys.cut(orders, 4, refit=True)[1] <= found.keys.cut(orders, 4, refit=False)[1]


def _error(facts: Facts, found: HeadWidths, cut: object) -> float:
    made = edits(found.site, cut, "narrow")  # type: ignore[arg-type]
    return _gap(_cut(facts, Action("test", found.site.label, made, "")), facts.program)


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_savings_are_what_is_saved_and_cuts_of_values_go_with_those_of_keys(
    name: str, measured: dict[str, Facts]
) -> None:
    facts = measured[name]
    plan, before = _plan(facts, shares=(0.5,)), total_cost(facts.program)
    for action in plan.actions[:3]:
        after = total_cost(_cut(facts, action))
        assert action.saving == {
            "parameters": before.parameters - after.parameters,
            "bytes": before.bytes - after.bytes,
            "flops": before.flops(DEFAULT_SIZES) - after.flops(DEFAULT_SIZES),
            "kv_bytes_per_token": before.kv_bytes_per_token - after.kv_bytes_per_token,
        }
    both = [a for a in plan.actions if a.place.endswith(("keys-width", "values-width"))]
    for order in (both, both[::-1]):
        after = _cut(facts, *order)
        assert total_cost(after).kv_bytes_per_token * 2 == before.kv_bytes_per_token
        assert _gap(after, facts.program) < 1.0


def test_an_odd_width_is_refused_where_only_whole_pairs_can_go(measured: dict[str, Facts]) -> None:
    with pytest.raises(UsageError, match="pairs"):
        _plan(Facts(measured["llama"].program), only=("layers.0.attention.keys@5",))
    widths = {a.evidence["width"] for a in _plan(measured["llama"], shares=(0.7,)).actions}
    assert widths == {5, 4}  # values, and keys rounded to a pair
    with pytest.raises(Unfit, match="whole pairs"):
        _found(measured["llama"]).cut("keys", 5, "activations", refit=True)


class _Odd(attending._Layer):
    """Tables that are no rotations: each channel has an angle of its own."""

    def turned(self, value: fx.Node, length: fx.Node) -> fx.Node:
        b = self.b
        steps = b.call(attending.aten.arange.default, length, dtype=torch.float32)
        rates = b.weight(f"rates_{value.name}", 0.7 ** torch.arange(DIM).float())
        column = b.call(attending.aten.unsqueeze.default, steps, 1)
        angles = b.call(attending.aten.mul.Tensor, column, rates)
        left = b.call(attending.aten.slice.Tensor, value, 3, 0, DIM // 2)
        right = b.call(attending.aten.slice.Tensor, value, 3, DIM // 2, DIM)
        swapped = b.call(attending.aten.cat.default, [right, left], -1)
        products = [
            b.call(attending.aten.mul.Tensor, part, b.call(table, angles))
            for part, table in (
                (value, attending.aten.cos.default),
                (swapped, attending.aten.sin.default),
            )
        ]
        return b.call(attending.aten.add.Tensor, *products)


def test_what_is_no_rotation_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attending, "_Layer", _Odd)
    what = Attending(rotary=True)
    facts = Facts(what.program(), what.batches(2))
    assert "keys" in facts.get(head_shapes).kinds["layers.0.attention"]
    plan = _plan(facts)
    reasons = {skip.reason for skip in plan.skips}
    assert reasons == {"something beside rotations stands between its channels and scores"}
    assert {action.target.split("@")[0] for action in plan.actions} == {"layers.0.attention.values"}


def test_fused_norms_and_fused_projections_are_followed() -> None:
    for what in (Attending(rotary=True, norms=True, keys=2), Attending(rotary=True, fused=True)):
        facts = Facts(what.program(), what.batches(2))
        label, found = next(iter(facts.get(head_widths).items()))
        for width, least, most in ((DIM, -1.0, 1e-5), (DIM // 2, 1e-4, 1.0)):
            made, _ = found.cut("keys", width, "activations", refit=True)
            after = _cut(facts, Action("test", label, made, ""))
            x = what.batches(1)[0]
            names = [port.name for port in after.signature.inputs]
            old, new = (p(**{n: x[n] for n in names})[0] for p in (facts.program, after))
            gap = float((new - old).norm() / old.norm())
            assert least < gap < most, (what, width, gap)
