"""Small models with hot paths in them, traced once a session."""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, rms_norm, silu

import redpass
from redpass.program import Program


class Paths(nn.Module):
    """A thin linear, a gated feed-forward, two norms of sums, and a pointwise end."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.thin = nn.Linear(width, 5, bias=False)
        self.wide = nn.Linear(5, width)
        self.gain = nn.Parameter(torch.rand(width) + 0.5)
        self.gate = nn.Linear(width, 40, bias=False)
        self.up = nn.Linear(width, 40)
        self.down = nn.Linear(40, width)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        x = x + torch.tanh(self.wide(self.thin(x)))
        normed = rms_norm(x, x.shape[-1:], self.gain, 1e-6)
        x = x + self.down(silu(self.gate(normed)) * self.up(normed))
        return gelu(self.norm(x) * 0.5) + skip


@functools.cache
def paths() -> Program:
    """`Paths` with symbolic batch and sequence."""
    torch.manual_seed(0)
    example = {"x": torch.randn(2, 5, 24), "skip": torch.randn(2, 5, 24)}
    inputs = ["x:float32[batch,seq,24]", "skip:float32[batch,seq,24]"]
    return redpass.load(Paths().eval(), example=example, inputs=inputs)


@functools.cache
def llama() -> Program:
    """A Llama of two layers after the exact passes: merged projections, fused norms."""
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=61, max_position_embeddings=64,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return redpass.optimize(redpass.load(model)).program
