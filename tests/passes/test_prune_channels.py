"""Channels that are cut: which go, what takes over, what is told of the rest."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from building import Builder, aten
from checking import plan_pass
from torch import nn

import redpass
from redpass import rewrite
from redpass.analysis.cost import total_cost
from redpass.analysis.inspection import DEFAULT_SIZES
from redpass.data import Batches
from redpass.errors import DataError, PassError, UsageError
from redpass.passes.prune_channels import PruneChannels
from redpass.plan import Action, Narrow, Plan
from redpass.program import Program
from redpass.verify.rules import check_rules

WIDTH, INNER = 8, 32


def gated(fused: str = "", inner: int = INNER, layers: int = 2) -> Program:
    """Gated feed-forwards on a stream; `fused`: one matrix for gate and up, parted by that op."""
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) / shape[-1] ** 0.5

    b = Builder()
    x = b.input("x", "batch", WIDTH)
    for layer in range(layers):
        if fused:
            both = b.call(aten.linear.default, x, b.weight(f"both{layer}", drawn(2 * inner, WIDTH)))
            call, sizes = {
                "chunk": (aten.chunk.default, (2, -1)),
                "split": (aten.split.Tensor, (inner, -1)),
                "split_with_sizes": (aten.split_with_sizes.default, ([inner, inner], -1)),
            }[fused]
            parts = b.call(call, both, *sizes)
            gate, up = (b.call(__import__("operator").getitem, parts, i) for i in range(2))
        else:
            gate, up = (
                b.call(aten.linear.default, x, b.weight(f"{name}{layer}", drawn(inner, WIDTH)))
                for name in ("gate", "up")
            )
        h = b.call(aten.mul.Tensor, b.call(aten.silu.default, gate), up)
        down = b.weight(f"down{layer}", drawn(WIDTH, inner))
        bias = b.weight(f"bias{layer}", drawn(WIDTH))
        x = b.call(aten.add.Tensor, x, b.call(aten.linear.default, h, down, bias))
    return b.program(x)


def rows(batches: int = 8, size: int = 64, seed: int = 1, width: int = WIDTH) -> Batches:
    """Rows near a plane of three dimensions: hidden channels are then alike, as in real models."""
    plane = torch.randn(3, width, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)

    def one() -> torch.Tensor:
        noise = 0.1 * torch.randn(size, width, generator=generator)
        return torch.randn(size, 3, generator=generator) @ plane + noise

    return Batches(tuple({"x": one()} for _ in range(batches)))


def plan(program: Program, data: Batches | None, **options: object) -> Plan:
    return plan_pass(PruneChannels(**options), program, data)


def applied(program: Program, actions: object) -> Program:
    after = rewrite.apply(program, actions)
    check_rules(after, paranoid=True)
    return after


def off(program: Program, after: Program, data: Batches) -> float:
    """Squared error of the first output over its squared norm."""
    pairs = [(program(b["x"])[0], after(b["x"])[0]) for b in data]
    lost = sum(float((new - old).square().sum()) for old, new in pairs)
    return lost / sum(float(old.square().sum()) for old, _ in pairs)


def test_repaired_loses_less_than_unrepaired_and_fewer_cuts_less_than_more():
    program, data, fresh = gated(), rows(), rows(seed=5)
    found = {}
    for refit in (True, False):
        actions = plan(program, data, refit=refit).actions
        for share in (24, 16, 8):
            chosen = [a for a in actions if a.target.endswith(f"@{share}")]
            found[refit, share] = off(program, applied(program, chosen), fresh)
    for share in (24, 16, 8):
        assert found[True, share] < 0.7 * found[False, share]
    for more, less in pairwise((24, 16, 8)):
        assert found[True, more] < found[True, less]


def test_the_predicted_loss_is_what_the_place_puts_into_the_stream():
    program, data = gated(layers=1), rows(16, 256)
    for action in plan(program, data).actions:
        measured = off(program, applied(program, [action]), rows(8, 256, seed=7))
        assert measured == pytest.approx(action.loss, rel=0.25)
        assert action.evidence["unrepaired"] > action.loss
        assert action.place == "layers.0.feed-forward/width"


@pytest.mark.parametrize("fused", ["chunk", "split", "split_with_sizes"])
def test_fused_gate_and_up_are_cut_alike(fused):
    program, data = gated(fused, layers=1), rows()
    after = applied(program, plan(program, data, only=("layers.0.feed-forward@16",)).actions)
    assert after.weights["both0"].shape == (32, WIDTH)
    kept = [(after.weights["both0"][i] == program.weights["both0"]).all(1).nonzero().item()
            for i in range(32)]  # fmt: skip
    assert [i + INNER for i in kept[:16]] == kept[16:]
    assert off(program, after, rows(seed=5)) < 0.2


def test_a_duplicated_neuron_goes_for_free():
    program = gated(layers=1)
    for name in ("gate0", "up0"):
        program.weights[name][16:] = program.weights[name][:16]
    action = plan(program, rows(), only=("layers.0.feed-forward@16",)).actions[0]
    assert off(program, applied(program, [action]), rows(seed=5)) < 1e-4
    assert action.loss < 1e-3 * action.evidence["unrepaired"]


def test_savings_are_what_the_program_no_longer_costs():
    program, data = gated(), rows()
    for action in plan(program, data).actions:
        before, after = total_cost(program), total_cost(applied(program, [action]))
        assert action.saving["parameters"] == before.parameters - after.parameters
        assert action.saving["bytes"] == before.bytes - after.bytes
        assert action.saving["flops"] == before.flops(DEFAULT_SIZES) - after.flops(DEFAULT_SIZES)


def test_together_cuts_all_layers_in_one_action():
    program, data = gated(), rows()
    actions = plan(program, data, together=True, shares=(0.5,)).actions
    assert [a.target for a in actions] == ["feed-forward.32@16"]
    after = applied(program, actions)
    assert {after.weights[f"down{i}"].shape[1] for i in range(2)} == {16}


def test_fewer_tokens_than_channels_work_and_are_told():
    program = gated(layers=1)
    actions = plan(program, rows(1, 6)).actions
    assert all("only 6 tokens for 32 channels" in action.reason for action in actions)
    after = applied(program, actions[:1])
    assert bool(torch.isfinite(after(torch.randn(3, WIDTH))[0]).all())


BAD = {
    "layers.0.feed-forward@0": "leaves 0 channels",
    "layers.0.feed-forward@32": "leaves 32 channels",
    "layers.0.feed-forward@99": "leaves 99 channels",
    "layers.0.feed-forward@12": "no multiple of 8",
    "layers.0.feed-forward": "does not say how much is left",
    "layers.0.feed-forward@²": "does not say how much is left",
    "layers.7.feed-forward@16": "no width is called",
    "stream@4": "cannot be cut",
}


@pytest.mark.parametrize("name", BAD)
def test_names_that_cannot_be_are_refused_before_any_work(name):
    with pytest.raises(UsageError, match=BAD[name]):
        plan(gated(), None, only=(name,))


@pytest.mark.parametrize(
    "options", [{"shares": (1.0,)}, {"shares": (0.0,)}, {"multiple": 0}, {"kinds": ("heads",)}]
)
def test_options_that_cannot_be_are_refused(options):
    with pytest.raises(UsageError):
        plan(gated(), rows(), **options)


def test_no_data_is_an_error_that_says_so():
    with pytest.raises(DataError, match="no data"):
        plan(gated(), None)


def test_what_is_left_alone_is_told():
    program = gated()
    skips = {skip.target: skip.reason for skip in plan(program, rows()).skips}
    assert skips["stream"] == "it is a public input's size"
    skips = {s.target: s.reason for s in plan(program, rows(), kinds=("channels",)).skips}
    assert "of kind 'feed-forward' is not a candidate" in skips["layers.0.feed-forward"]
    small = plan(gated(inner=4), rows()).skips
    assert "no smaller width of 4 is a multiple of 8" in [skip.reason for skip in small]
    b = Builder()
    alone = b.program(b.call(aten.relu.default, b.input("x", "batch", WIDTH)))
    assert (
        plan(alone, rows()).skips[0].reason
        == "no linear or convolution with a plain weight reads what another one computes"
    )


def test_a_width_whose_moments_do_not_fit_is_left_alone(monkeypatch):
    monkeypatch.setattr("redpass.analysis.widths.statistics.LIMIT", 1000)
    found = plan(gated(layers=1), rows())
    assert not found.actions
    assert "second moments take" in found.skips[-1].reason


class Convolutions(nn.Module):
    """Batch norms, a residual sum, a depthwise convolution, a concatenation, a flattened end."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.inner = nn.Conv2d(16, 24, 1, bias=False)
        self.inner_norm = nn.BatchNorm2d(24)
        self.depth = nn.Conv2d(24, 24, 3, padding=1, groups=24)
        self.back = nn.Conv2d(24, 16, 1)
        self.side = nn.Conv2d(16, 8, 3, padding=1)
        self.mix = nn.Conv2d(24, 8, 1)
        self.head = nn.Linear(8 * 16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        h = torch.relu(self.depth(torch.relu(self.inner_norm(self.inner(x)))))
        x = x + self.back(h)
        x = torch.relu(self.mix(torch.cat([x, self.side(x)], 1)))
        return self.head(x.flatten(1))


@pytest.fixture(scope="module")
def convolutions() -> Program:
    torch.manual_seed(0)
    module = Convolutions().eval()
    for norm in (module.norm, module.inner_norm):
        norm.running_mean.normal_()
        norm.weight.data.uniform_(0.5, 1.5)
    return redpass.load(
        module, example={"x": torch.randn(2, 3, 4, 4)}, inputs=["x:float32[batch,3,4,4]"]
    )


def images(seed: int = 1) -> Batches:
    generator = torch.Generator().manual_seed(seed)
    return Batches(tuple({"x": torch.randn(16, 3, 4, 4, generator=generator)} for _ in range(8)))


def test_all_coupled_channels_are_cut_together(convolutions):
    left = {}
    for refit in (True, False):
        chosen = plan(convolutions, images(), refit=refit, multiple=4, shares=(0.5,)).actions
        assert len(chosen) == 4  # of the sum, of the depthwise one, of the side's, of the mix
        after = applied(convolutions, chosen)
        left[refit] = off(convolutions, after, images(seed=3))
    assert left[True] < 0.7 * left[False]


def test_cuts_that_share_weights_go_in_any_order(convolutions):
    found = plan(convolutions, images(), multiple=4, shares=(0.5,)).actions
    assert len(found) == 4
    one, other = applied(convolutions, found), applied(convolutions, found[::-1])
    for name, weight in one.weights.items():
        torch.testing.assert_close(weight, other.weights[name], rtol=1e-4, atol=1e-5)
    x = images(seed=3)[0]["x"]
    assert one(x)[0].shape == convolutions(x)[0].shape


def test_a_batch_norm_takes_up_the_mean_of_what_went():
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Conv2d(3, 16, 1), nn.ReLU(), nn.Conv2d(16, 8, 1, bias=False), nn.BatchNorm2d(8)
    ).eval()
    module[0].weight.data[8:] = 0.0  # eight channels are constant
    module[0].bias.data[8:] = 0.5
    example = {"input": torch.randn(2, 3, 4, 4)}
    program = redpass.load(module, example=example, inputs=["input:float32[batch,3,4,4]"])
    data = Batches(tuple({"input": torch.randn(8, 3, 4, 4)} for _ in range(4)))
    action = plan(program, data, shares=(0.5,)).actions[0]
    after = applied(program, [action])
    x = torch.randn(4, 3, 4, 4)
    torch.testing.assert_close(after(x)[0], program(x)[0], rtol=1e-4, atol=1e-4)


def test_a_weight_that_two_layers_share_is_cut_for_both():
    b = Builder()
    x = b.input("x", "batch", WIDTH)
    torch.manual_seed(0)
    up, down = (b.weight(n, torch.randn(s) / 3) for n, s in (("up", (24, 8)), ("down", (8, 24))))
    for _ in range(2):
        h = b.call(aten.relu.default, b.call(aten.linear.default, x, up))
        x = b.call(aten.add.Tensor, x, b.call(aten.linear.default, h, down))
    program = b.program(x)
    actions = plan(program, rows()).actions
    assert len({action.place for action in actions}) == 1
    after = applied(program, actions[:1])
    assert after.weights["up"].shape[0] == after.weights["down"].shape[1] < 24
    bare = plan(program, rows(), refit=False).actions[:1]
    assert off(program, after, rows(seed=5)) < off(program, applied(program, bare), rows(seed=5))


def test_narrow_speaks_of_places_in_the_planned_program():
    b = Builder()
    x = b.input("x", "batch", 6)
    w = b.weight("w", torch.arange(36.0).reshape(6, 6))
    program = b.program(b.call(aten.linear.default, x, w))
    cut = [Action("t", str(i), (Narrow("w", 0, torch.tensor(p)),), "") for i, p in
           enumerate([[1, 4], [0, 5]])]  # fmt: skip
    after = rewrite.apply(program, cut)
    assert torch.equal(after.weights["w"], program.weights["w"][2:4])
    assert after.outputs[0].meta["val"].shape[1] == 2
    with pytest.raises(PassError, match="another action"):
        rewrite.apply(program, [cut[0], cut[0]])


def test_batch_norms_that_also_return_statistics_are_followed():
    from operator import getitem

    torch.manual_seed(0)
    b = Builder()
    x = b.input("x", "batch", 3, 4, 4)
    y = b.call(aten.conv2d.default, x, b.weight("first", torch.randn(16, 3, 1, 1)))
    numbers = [b.weight(name, torch.rand(16) + 0.5) for name in ("gain", "bias", "mean", "var")]
    norm = b.call(aten._native_batch_norm_legit_no_training.default, y, *numbers, 0.1, 1e-5)
    y = b.call(aten.relu.default, b.call(getitem, norm, 0))
    program = b.program(
        b.call(aten.conv2d.default, y, b.weight("second", torch.randn(4, 16, 1, 1)))
    )
    actions = plan(program, images(), shares=(0.5,)).actions
    assert len(actions) == 1
    after = applied(program, actions)
    assert {len(after.weights[name]) for name in ("first", "gain", "bias", "mean", "var")} == {8}
    bare = plan(program, images(), shares=(0.5,), refit=False).actions
    fresh = images(seed=3)
    assert off(program, after, fresh) < off(program, applied(program, bare), fresh)
