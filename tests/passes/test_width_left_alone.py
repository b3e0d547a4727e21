"""What passes over heads leave alone, with the reason: shared, quantised and silent projections."""

from __future__ import annotations

from dataclasses import replace

import attending
import pytest
import torch
from attending import Attending
from checking import plan_pass
from torch import fx

from redpass import rewrite
from redpass.data import Batches
from redpass.passes.cluster_heads import ClusterHeads
from redpass.passes.merge_key_value_heads import MergeKeyValueHeads
from redpass.passes.prune_heads import PruneHeads
from redpass.passes.shrink_heads import ShrinkHeads
from redpass.plan import Pass

PASSES = (
    ShrinkHeads(multiple=1),
    PruneHeads(),
    ClusterHeads(),
    MergeKeyValueHeads(),
)


class _Quantised(attending._Layer):
    """Matrices are whole numbers, multiplied out before each product."""

    def linear(self, x: fx.Node, name: str) -> fx.Node:
        b, aten = self.b, attending.aten
        stored = (self.drawn[name] * 50).round().clamp(-127, 127).to(torch.int8)
        whole = b.weight(f"layers.{self.layer}.{name}8", stored)
        matrix = b.call(aten.mul.Tensor, b.call(aten.to.dtype, whole, torch.float32), 0.02)
        return b.call(aten.linear.default, x, matrix, self.w.get(f"{name}b"))


@pytest.mark.parametrize("pass_", PASSES, ids=lambda pass_: pass_.name)
def test_quantised_projections_are_left_alone(pass_: Pass, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attending, "_Layer", _Quantised)
    what = Attending(rotary=True)
    plan = plan_pass(pass_, what.program(), what.batches(2))
    assert not plan.actions
    assert {skip.reason for skip in plan.skips} == {"no plain linear layer makes its queries"}


class _Complex(attending._Layer):
    """Positions turn heads as complex numbers: neighbouring channels are a number's two parts."""

    def turned(self, value: fx.Node, length: fx.Node) -> fx.Node:
        b, aten = self.b, attending.aten
        steps = b.call(aten.arange.default, length, dtype=torch.float32)
        rates = b.weight(f"rates_{value.name}", 0.5 ** torch.arange(attending.DIM // 2).float())
        angles = b.call(aten.mul.Tensor, b.call(aten.unsqueeze.default, steps, 1), rates)
        turns = b.call(aten.polar.default, b.call(aten.ones_like.default, angles), angles)
        shape = [attending.DIM // 2, 2]
        parts = b.call(aten.unflatten.int, b.call(aten.contiguous.default, value), 3, shape)
        numbers = b.call(aten.view_as_complex.default, parts)
        turned = b.call(aten.view_as_real.default, b.call(aten.mul.Tensor, numbers, turns))
        return b.call(aten.flatten.using_ints, turned, 3)


@pytest.mark.parametrize("pass_", PASSES, ids=lambda pass_: pass_.name)
def test_heads_turned_as_complex_numbers_are_left_alone(
    pass_: Pass, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attending, "_Layer", _Complex)
    what = Attending(rotary=True, keys=2)
    plan = plan_pass(pass_, what.program(), what.batches(2))
    assert not [action for action in plan.actions if "values" not in action.target]
    assert all(skip.reason for skip in plan.skips)
    assert plan.skips


@pytest.mark.parametrize("pass_", PASSES, ids=lambda pass_: pass_.name)
def test_a_projection_that_two_layers_share_is_left_alone_in_both(pass_: Pass) -> None:
    what = Attending(layers=2, rotary=True)
    program = what.program()
    shared = {**program.weights, "layers.1.q": program.weights["layers.0.q"]}
    plan = plan_pass(pass_, replace(program, weights=shared), what.batches(2))
    assert not plan.actions
    assert len(plan.skips) == 2
    assert all("has other readers" in skip.reason for skip in plan.skips)


def test_singular_moments_of_rotated_keys_are_no_trouble() -> None:
    """One token a row, all alike: fewer tokens than channels, and no variance of the keys."""
    what = Attending(rotary=True, keys=2, cache=False)
    program = what.program()
    row = what.batches(1, rows=1, length=1)[0]
    names = [port.name for port in program.signature.inputs]
    data = Batches(({name: row[name] for name in names},) * 2)
    plan = plan_pass(ShrinkHeads(multiple=1, shares=(0.5,)), program, data)
    assert {action.target for action in plan.actions} == {
        "layers.0.attention.keys@4",
        "layers.0.attention.values@4",
    }
    for action in plan.actions:
        assert action.evidence["tokens"] == 2
        assert action.loss is not None
        assert 0.0 <= action.loss < 1.0
        after = rewrite.apply(program, [action])
        given = what.batches(1)[0]
        found = after(**{name: given[name] for name in names})[0]
        assert bool(torch.isfinite(found).all())
