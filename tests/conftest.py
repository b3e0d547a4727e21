"""Small models that several test folders share, traced once a session."""

from __future__ import annotations

import pytest
import torch
from hypothesis import settings
from torch import nn

import redpass
from redpass.program import Program

# The same examples on every machine and in every run: a property that fails, fails for everybody.
settings.register_profile("same", derandomize=True, deadline=None, max_examples=8)
settings.load_profile("same")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--update-golden", action="store_true", help="write golden files instead of comparing"
    )


class Block(nn.Module):
    """A pre-norm feed-forward branch around a residual stream."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.nn.functional.gelu(self.up(self.norm(x))))


class Residual(nn.Module):
    """Four feed-forward branches between an input and an output projection."""

    def __init__(self, width: int = 16, depth: int = 4) -> None:
        super().__init__()
        self.first = nn.Linear(8, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.last = nn.Linear(width, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return self.last(x)


def residual_module() -> Residual:
    """A `Residual` whose second branch does nothing and whose third does very little."""
    torch.manual_seed(0)
    module = Residual().eval()
    with torch.no_grad():
        module.blocks[1].down.weight.zero_()
        module.blocks[1].down.bias.zero_()
        module.blocks[2].down.weight.mul_(0.01)
        module.blocks[2].down.bias.mul_(0.01)
    return module


@pytest.fixture(scope="session")
def residual() -> Program:
    """`residual_module` as a program with symbolic batch and sequence."""
    return redpass.load(
        residual_module(), example={"x": torch.randn(2, 5, 8)}, inputs=["x:float32[batch,seq,8]"]
    )


@pytest.fixture(scope="session")
def residual_data() -> redpass.Splits:
    """Random rows for `residual`, split three ways."""
    generator = torch.Generator().manual_seed(1)
    items = tuple({"x": torch.randn(4, 6, 8, generator=generator)} for _ in range(12))
    return redpass.split(redpass.Batches(items, "random rows"))
