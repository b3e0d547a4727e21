"""Channels of vision networks: what is cut computes what the same network with zeroed readers does.

The slow reference of a cut without repair: in every weight that reads a width, the slices of the
units that go are zero. Then they count for nothing, and cutting them out may change no number.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import transformers
from checking import plan_pass
from torch import Tensor, nn

import redpass
from redpass import rewrite
from redpass.data import Batches
from redpass.facts import Facts
from redpass.passes.fold_constants import FoldConstants
from redpass.passes.prune_channels import PruneChannels
from redpass.plan import Action, Narrow, Plan
from redpass.program import Program
from redpass.verify.rules import check_rules


class Small(nn.Module):
    """SqueezeNet's fire, Inception's branches, DenseNet's concatenations, group norms."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.squeeze = nn.Conv2d(8, 8, 1)
        self.narrow, self.wide = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 12, 3, padding=1)
        self.one, self.pooled = nn.Conv2d(20, 8, 1), nn.Conv2d(20, 4, 1)
        self.five = nn.Sequential(nn.Conv2d(20, 8, (1, 5), padding=(0, 2)), nn.ReLU(),
                                  nn.Conv2d(8, 8, (5, 1), padding=(2, 0)))  # fmt: skip
        self.dense = nn.ModuleList(nn.Conv2d(20 + 4 * n, 4, 3, padding=1) for n in range(2))
        self.norms = nn.ModuleList(nn.BatchNorm2d(20 + 4 * n) for n in range(3))
        self.change = nn.Conv2d(28, 24, 1)
        self.groups, self.gain = nn.GroupNorm(6, 24), nn.Parameter(torch.rand(24, 1, 1) + 0.5)
        self.after = nn.Conv2d(24, 24, 3, padding=1, groups=6)
        self.last, self.single = nn.Conv2d(24, 8, 1), nn.GroupNorm(1, 8)
        self.head = nn.Linear(8, 5)

    def forward(self, pixel_values: Tensor) -> Tensor:
        x = torch.relu(self.squeeze(torch.relu(self.stem(pixel_values))))
        x = torch.relu(torch.cat([self.narrow(x), self.wide(x)], 1))
        pooled = self.pooled(nn.functional.avg_pool2d(x, 3, 1, 1))
        x = torch.cat([self.one(x), self.five(x), pooled], 1)
        for norm, dense in zip(self.norms, self.dense, strict=False):
            x = torch.cat([x, dense(torch.relu(norm(x)))], 1)
        x = self.groups(self.change(torch.relu(self.norms[2](x))))
        x = x + self.gain * self.after(nn.functional.silu(x))
        x = self.single(self.last(x))
        found: Tensor = self.head(x.mean((2, 3)))
        return found


def _net(kind: str, **config: object) -> nn.Module:
    options = getattr(transformers, f"{kind}Config")(**config)
    return getattr(transformers, f"{kind}ForImageClassification")(options)  # type: ignore[no-any-return]


NETS: dict[str, tuple[Callable[[], nn.Module], int, int, set[str]]] = {
    "small": (Small, 8, 8, {"a group norm mixes its channels"}),
    "resnet": (lambda: _net("ResNet", embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1]),
               32, 4, set()),
    "bit": (lambda: _net("Bit", embedding_size=32, hidden_sizes=[32, 64], depths=[1, 1],
                         num_groups=8), 32, 7, set()),
    "regnet": (lambda: _net("RegNet", embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1],
                            groups_width=8), 32, 5, set()),
    "convnext": (lambda: _net("ConvNext", hidden_sizes=[16, 24], depths=[1, 1], num_stages=2),
                 32, 2, {"layer_norm mixes its units"}),
    "convnextv2": (lambda: _net("ConvNextV2", hidden_sizes=[16, 24], depths=[1, 1], num_stages=2),
                   32, 0, {"layer_norm mixes its units", "mean mixes what it reads of it"}),
    "focalnet": (lambda: _net("FocalNet", image_size=16, embed_dim=16, depths=[1, 1],
                              hidden_sizes=[16, 32], focal_levels=[2, 2], focal_windows=[3, 3],
                              patch_size=2), 16, 6, {"layer_norm mixes its units"}),
    "poolformer": (lambda: _net("PoolFormer", num_encoder_blocks=2, hidden_sizes=[16, 24],
                                depths=[1, 1], patch_sizes=[7, 3], strides=[4, 2], padding=[2, 1],
                                mlp_ratio=2.0), 32, 2, {"a group norm mixes its channels"}),
}  # fmt: skip
"""Network, image size, how many widths can be cut, and why the others are not."""


def _module(make: Callable[[], nn.Module]) -> nn.Module:
    """The network with statistics, gains and layer scales that hide no mistake."""
    torch.manual_seed(0)
    module = make().eval()
    for name, value in [*module.named_parameters(), *module.named_buffers()]:
        if value.dim() == 1 and "running_var" in name:
            value.data.uniform_(0.5, 1.5)
        elif value.dim() == 1:
            value.data.add_(0.3 * torch.randn(value.shape))
        elif "weight" in name:
            value.data.mul_(1.5)
    return module


def images(size: int, seed: int = 1) -> Batches:
    generator = torch.Generator().manual_seed(seed)
    return Batches(
        tuple(
            {"pixel_values": torch.randn(2, 3, size, size, generator=generator)} for _ in range(2)
        )
    )


def plan(program: Program, data: Batches, **options: object) -> tuple[Plan, Facts]:
    pass_ = PruneChannels(**{"multiple": 4, "shares": (0.5,), **options})  # type: ignore[arg-type]
    facts = Facts(program, data).restrict(tuple(pass_.needs))
    return pass_.plan(program, facts), facts


def reference(program: Program, facts: Facts, actions: tuple[Action, ...]) -> Program:
    """The program with zeros where a weight reads units that the actions cut."""
    from redpass.analysis.widths.places import channel_places

    weights = dict(program.weights)
    for action in actions:
        width = facts.get(channel_places).by_label[action.target.rpartition("@")[0]]
        lost = {(e.weight, e.axis): e.gone for e in action.edits if isinstance(e, Narrow)}
        for reader in width.readers:
            gone = lost[reader.weight, reader.axis]
            weights[reader.weight] = weights[reader.weight].index_fill(reader.axis, gone, 0.0)
    return replace(program, weights=weights)


SLOW = ("convnext", "regnet", "resnet")  # what they have is in the others, too


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in NETS]
)
def test_cut_channels_are_channels_that_nothing_reads(name: str) -> None:
    make, size, count, reasons = NETS[name]
    program = redpass.load(
        _module(make),
        example={"pixel_values": torch.randn(2, 3, size, size)},
        inputs=[f"pixel_values:float32[batch,3,{size},{size}]"],
    )
    # Standardised weights are constants.
    program = rewrite.apply(program, plan_pass(FoldConstants(), program).actions)
    data = images(size)
    found, facts = plan(program, data, refit=False)
    assert len(found.actions) == count
    told = {s.reason for s in found.skips if "multiple of 4" not in s.reason}
    assert {
        next((r for r in reasons if r.partition(" ")[2] in why), why) for why in told
    } == reasons
    after = rewrite.apply(program, found.actions)
    check_rules(after)
    for values in data:
        wanted = reference(program, facts, found.actions)(**values)[0]
        torch.testing.assert_close(after(**values)[0], wanted, atol=1e-5, rtol=1e-4)
        if count:
            assert float((wanted - program(**values)[0]).abs().max()) > 1e-4
