"""Small modules that the verification tests trace: a masked network and a next-token model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from redpass.frontend.trace import trace
from redpass.program import Origin, Program

VOCABULARY = 11


class Masked(nn.Module):
    """Two linears that read one value, an activation, a projection, padding zeroed at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 16)
        self.norm = nn.LayerNorm(16)
        self.left, self.right = nn.Linear(16, 24), nn.Linear(16, 24)
        self.down = nn.Linear(24, 16)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.embed(input_ids)
        y = self.norm(x)
        x = x + self.down(nn.functional.silu(self.left(y)) * self.right(y))
        return x * attention_mask.unsqueeze(-1).to(x.dtype)


class Merged(nn.Module):
    """`Masked` with its two linears as one: the same sums in another order."""

    def __init__(self, source: Masked) -> None:
        super().__init__()
        self.source = source
        both = (source.left, source.right)
        self.weight = nn.Parameter(torch.cat([linear.weight for linear in both]).detach())
        self.bias = nn.Parameter(torch.cat([linear.bias for linear in both]).detach())

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.source.embed(input_ids)
        left, right = nn.functional.linear(self.source.norm(x), self.weight, self.bias).chunk(2, -1)
        x = x + self.source.down(nn.functional.silu(left) * right)
        return x * attention_mask.unsqueeze(-1).to(x.dtype)


class Reordered(nn.Module):
    """`Masked` with the same weights and the sum of the residual the other way round."""

    def __init__(self, source: Masked, wrong: str = "") -> None:
        super().__init__()
        self.source, self.wrong = source, wrong

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        net = self.source
        x = net.embed(input_ids)
        y = net.norm(x)
        if self.wrong == "scaled":
            y = y * 1.001
        up = net.right(y) * nn.functional.silu(net.left(y))
        bias = None if self.wrong == "no bias" else net.down.bias
        x = nn.functional.linear(up, net.down.weight, bias) + x
        if self.wrong == "late mask":
            attention_mask = attention_mask.roll(1, 1)
        return x * attention_mask.unsqueeze(-1).to(x.dtype)


class Language(nn.Module):
    """A model of the next token: a running mean of embeddings and a head."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed, self.head = nn.Embedding(VOCABULARY, 8), nn.Linear(8, VOCABULARY)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        weight = attention_mask.unsqueeze(-1).to(torch.float32)
        total = (self.embed(input_ids) * weight).cumsum(1)
        hidden = total / weight.cumsum(1).clamp_min(1)
        return {"logits": self.head(hidden.to(self.head.weight.dtype)), "hidden": hidden}


class Classes(nn.Module):
    """A linear classifier of vectors."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x)


class Position(nn.Module):
    """Positions from a table of 12 rows, counted inside."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(VOCABULARY, 8), nn.Embedding(12, 8)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.embed(input_ids) + self.place(torch.arange(input_ids.shape[1]))


TEXT_DIMS = {"input_ids": ("batch", "seq"), "attention_mask": ("batch", "seq")}


def text(module: nn.Module) -> Program:
    """Traces a module of `input_ids` and `attention_mask`."""
    ids = torch.randint(0, VOCABULARY, (2, 5), generator=torch.Generator().manual_seed(0))
    example = {"input_ids": ids, "attention_mask": torch.ones(2, 5, dtype=torch.int64)}
    return traced(module, example, TEXT_DIMS)


def traced(
    module: nn.Module, example: Mapping[str, Tensor], dims: Mapping[str, tuple[str | int, ...]]
) -> Program:
    """Traces a module in eval mode."""
    return trace(module.eval(), example, dims=dims, origin=Origin("module", "test"))


def adopting(after: Program, before: Program) -> Program:
    """Returns `after` reading the very tensors of `before` where names end alike."""
    known = {name.removeprefix("source."): tensor for name, tensor in before.weights.items()}
    shared = {
        name: known.get(name.removeprefix("source."), tensor)
        for name, tensor in after.weights.items()
    }
    return replace(after, weights=shared)
