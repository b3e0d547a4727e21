"""Convolutional networks: equal channels merge exactly, whole groups can be cut."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from checking import check_numbers, plan_pass, run_pass
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1] / "analysis"))

from redpass import rewrite
from redpass.data import Batches
from redpass.passes.merge_equal_neurons import MergeEqualNeurons
from redpass.passes.prune_channels import PruneChannels
from redpass.program import Program
from redpass.verify.rules import check_rules


class Net(nn.Module):
    """A gated depthwise block with a residual sum, a grouped one, a concatenation, a flat end."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.stem_norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.inner, self.inner_norm = nn.Conv2d(8, 12, 1, bias=False), nn.BatchNorm2d(12)
        self.depth = nn.Conv2d(12, 12, 3, padding=1, groups=12, bias=False)
        self.depth_norm = nn.BatchNorm2d(12)
        self.squeeze, self.excite = nn.Conv2d(12, 4, 1), nn.Conv2d(4, 12, 1)
        self.project, self.project_norm = nn.Conv2d(12, 8, 1, bias=False), nn.BatchNorm2d(8)
        self.before, self.before_norm = nn.Conv2d(8, 16, 1, bias=False), nn.BatchNorm2d(16)
        self.grouped, self.after = nn.Conv2d(16, 24, 3, groups=4, padding=1), nn.Conv2d(24, 6, 1)
        self.wide, self.wide_norm = nn.Conv2d(14, 10, 3, bias=False), nn.BatchNorm2d(10)
        self.head = nn.Linear(10 * 9, 5)

    def forward(self, pixel_values: Tensor) -> Tensor:
        x = torch.relu(self.stem_norm(self.stem(pixel_values)))
        y = nn.functional.hardswish(self.inner_norm(self.inner(x)))
        y = nn.functional.hardswish(self.depth_norm(self.depth(y)))
        gate = self.excite(torch.relu(self.squeeze(nn.functional.adaptive_avg_pool2d(y, 1))))
        x = x + self.project_norm(self.project(y * torch.sigmoid(gate)))
        z = torch.relu(self.before_norm(self.before(x)))
        z = self.after(torch.relu(self.grouped(z)))
        z = torch.relu(self.wide_norm(self.wide(torch.cat([x, z], 1))))
        found: Tensor = self.head(nn.functional.max_pool2d(z, 2).flatten(1))
        return found


def _statistics(norm: nn.BatchNorm2d, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    norm.running_mean.add_(0.2 * torch.randn(len(norm.running_mean), generator=generator))
    norm.running_var.mul_(0.5 + torch.rand(len(norm.running_var), generator=generator))


def _copy(layers: list[nn.Module], gone: int, kept: int, block: int = 1) -> None:
    """Makes channels of all layers that have them equal."""
    for layer in layers:
        for tensor in layer.state_dict().values():
            if tensor.dim():
                start, end = gone * block, kept * block
                tensor[start : start + block] = tensor[end : end + block]


def _planted() -> Net:
    torch.manual_seed(0)
    net = Net().eval()
    for number, module in enumerate(net.modules()):
        if isinstance(module, nn.BatchNorm2d):
            _statistics(module, number)
            nn.init.normal_(module.weight, 1.0, 0.2)
            nn.init.normal_(module.bias, 0.0, 0.2)
    inner = [net.inner, net.inner_norm, net.depth, net.depth_norm, net.excite]
    with torch.no_grad():
        _copy(inner, 5, 1)
        _copy(inner, 9, 1)
        _copy([net.stem, net.stem_norm, net.project, net.project_norm], 6, 2)
        _copy([net.squeeze], 3, 0)
        net.wide.weight[7] = net.wide.weight[4]
        for name in ("running_mean", "running_var"):
            getattr(net.wide_norm, name)[7] = getattr(net.wide_norm, name)[4]
        for vector in (net.wide_norm.weight, net.wide_norm.bias):
            vector[7] = 2.5 * vector[4]
    return net


def _traced(net: nn.Module) -> Program:
    from redpass.frontend import load

    return load(net, example={"pixel_values": torch.randn(2, 3, 8, 8)})


@pytest.fixture(scope="module")
def planted() -> Program:
    """Equal channels in the block, the stream and the gate; a multiple behind ReLU; traced."""
    return _traced(_planted())


def _rows(count: int = 4, seed: int = 0) -> Batches:
    generator = torch.Generator().manual_seed(seed)
    return Batches(
        tuple({"pixel_values": torch.randn(6, 3, 8, 8, generator=generator)} for _ in range(count))
    )


def test_equal_and_rescaled_channels_merge_through_norms_sums_and_gates(planted: Program) -> None:
    checked = run_pass(MergeEqualNeurons(multiple=1), planted)
    merged = sorted((a.evidence["width"], a.evidence["channels"]) for a in checked.plan.actions)
    assert merged == [(4, 1), (8, 1), (10, 1), (12, 2)]
    for inputs in _rows(2):
        check_numbers(MergeEqualNeurons.exactness, planted, checked.after, inputs)
    sizes = {tuple(w.shape) for w in checked.after.weights.values()}
    assert {(10, 7, 1, 1), (10, 1, 3, 3), (9, 13, 3, 3), (5, 81)} <= sizes


def test_channels_that_differ_in_one_norm_or_sign_are_not_merged() -> None:
    net = _planted()
    with torch.no_grad():
        net.depth_norm.bias[[5, 9]] += 1e-3
        net.project_norm.running_mean[6] += 1e-3
        net.squeeze.bias[3] += 1e-3
        net.wide_norm.bias[7] *= -1
    plan = run_pass(MergeEqualNeurons(multiple=1), _traced(net)).plan
    assert sorted(a.evidence["width"] for a in plan.actions) == [12]  # 5 and 9 are still alike
    reasons = [s.reason for s in plan.skips if s.rule.endswith("channels")]
    assert reasons.count("no two channels are equal") >= 3


def test_whole_groups_of_a_grouped_convolution_go(planted: Program) -> None:
    plan = plan_pass(PruneChannels(shares=(0.5,), multiple=1), planted, _rows())
    (cut,) = [
        a for a in plan.actions if "2 of 4 channels" in a.reason and "grouped" in str(a.edits)
    ]
    after = rewrite.apply(planted, [cut])
    check_rules(after)
    shapes = {name: tuple(w.shape) for name, w in after.weights.items()}
    assert shapes["grouped.weight"] == (12, 4, 3, 3)
    assert shapes["before.weight"] == (8, 8, 1, 1)
    assert shapes["after.weight"] == (6, 12, 1, 1)
    x = _rows(1, 5)[0]["pixel_values"]
    old, new = planted(x)[0], after(x)[0]
    assert 1e-4 < float((new - old).norm() / old.norm()) < 0.5
    assert cut.loss is not None
    assert cut.loss < cut.evidence["unrepaired"]


def test_a_group_that_adds_nothing_goes_for_free() -> None:
    net = _planted()
    with torch.no_grad():
        net.grouped.weight[6:12] = 0.0
        net.grouped.bias[6:12] = -1.0
    program = _traced(net)
    actions = plan_pass(PruneChannels(shares=(0.75,), multiple=1), program, _rows()).actions
    (cut,) = [a for a in actions if "3 of 4 channels" in a.reason and "grouped" in str(a.edits)]
    assert cut.loss == pytest.approx(0.0, abs=1e-9)
    x = _rows(1, 5)[0]["pixel_values"]
    torch.testing.assert_close(
        rewrite.apply(program, [cut])(x)[0], program(x)[0], atol=1e-5, rtol=1e-4
    )
