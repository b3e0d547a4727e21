"""Programs that several export tests share, traced once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from redpass.frontend.trace import trace
from redpass.program import Origin, Program


class Function(nn.Module):
    """A function of named tensors as a module."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, **values: Tensor) -> Any:
        return self.function(**values)


def program_of(
    function: Callable[..., Any] | nn.Module,
    example: dict[str, Tensor],
    dims: dict[str, tuple[Any, ...]] | None = None,
) -> Program:
    """Traces a function of named tensors; by default the first axis is `batch`, if it may be."""
    module = function if isinstance(function, nn.Module) else Function(function)
    found = dims or {
        name: ("batch", *value.shape[1:]) if value.dim() else () for name, value in example.items()
    }
    return trace(module, example, dims=found, origin=Origin("module", "test"))


@pytest.fixture(scope="session")
def llama() -> Program:
    """A causal LM with grouped heads, rotary embeddings and RMS norms."""
    transformers = pytest.importorskip("transformers")
    import redpass

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, pad_token_id=0, tie_word_embeddings=True,
    )  # fmt: skip
    return redpass.load(transformers.LlamaForCausalLM(config).eval())


class Encoder(nn.Module):
    """One post-norm layer with a padding mask: what BERT is made of."""

    def __init__(self, width: int = 16, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.table = nn.Embedding(23, width)
        self.projections = nn.ModuleList(nn.Linear(width, width) for _ in range(4))
        self.norm, self.last = nn.LayerNorm(width), nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.table(input_ids)
        batch, seq, width = x.shape
        q, k, v = (
            layer(x).view(batch, seq, self.heads, -1).transpose(1, 2)
            for layer in self.projections[:3]
        )
        mask = attention_mask.bool()[:, None, None, :].expand(batch, 1, seq, seq)
        y = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask)
        y = y.transpose(1, 2).reshape(batch, seq, width)
        x = self.norm(x + self.projections[3](y))
        return self.last(x + self.down(torch.nn.functional.gelu(self.up(x))))


@pytest.fixture(scope="session")
def encoder() -> Program:
    """A post-norm encoder layer over tokens with a padding mask."""
    torch.manual_seed(0)
    example = {
        "input_ids": torch.arange(10).view(2, 5),
        "attention_mask": torch.ones(2, 5, dtype=torch.int64),
    }
    dims = dict.fromkeys(example, ("batch", "seq"))
    return trace(Encoder().eval(), example, dims=dims, origin=Origin("module", "Encoder"))
