"""Parallel branches share one sum; dropping both must leave neither."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import redpass
from redpass.passes.drop_branches import DropBranches
from redpass.recipe import replay


class Parallel(nn.Module):
    """`x + a(norm(x)) + b(norm(x))` three times; the second pair's results are tiny."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(8) for _ in range(3))
        self.up = nn.ModuleList(nn.Linear(8, 32) for _ in range(6))
        self.down = nn.ModuleList(nn.Linear(32, 8) for _ in range(6))

    def forward(self, x):
        for i, norm in enumerate(self.norms):
            n = norm(x)
            a, b = (
                self.down[j](torch.nn.functional.gelu(self.up[j](n))) for j in (2 * i, 2 * i + 1)
            )
            x = x + (a + b)
        return x


@pytest.fixture(scope="module")
def parallel():
    torch.manual_seed(0)
    module = Parallel().eval()
    with torch.no_grad():
        for j in (2, 3):
            module.down[j].weight.mul_(1e-4)
            module.down[j].bias.mul_(1e-4)
    return redpass.load(module, example={"x": torch.randn(3, 8)}, inputs=["x:float32[batch,8]"])


def test_both_parallel_branches_go_one_after_the_other(parallel):
    rows = tuple({"x": torch.randn(4, 8)} for _ in range(12))
    data = redpass.split(redpass.Batches(rows, "random rows"))
    result = redpass.optimize(parallel, (DropBranches(),), budget="relative_error<=0.01", data=data)
    gone = set(parallel.weights) - set(result.program.weights)
    kinds = ("weight", "bias")
    inner = {f"{part}.{j}.{kind}" for part in ("up", "down") for j in (2, 3) for kind in kinds}
    assert gone == inner | {"norms.1.weight", "norms.1.bias"}
    assert replay(parallel, result.record.recipe).text == result.program.text
