"""The exact cleanup on traced models: tables per layer computed once, masks without gathers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from checking import is_same_bits, run_pass
from torch import Tensor, nn

import redpass
from redpass.frontend import random_inputs
from redpass.passes import CLEANUP
from redpass.program import Program

transformers = pytest.importorskip("transformers")

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": 96,
    "max_position_embeddings": 64,
}


class Layer(nn.Module):
    """Attention that computes its own rotary table and its own causal mask."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(16, 48, bias=False)
        self.register_buffer("frequencies", 1.0 / 100 ** (torch.arange(4) / 4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).view(x.shape[0], x.shape[1], 3, 2, 8).permute(2, 0, 3, 1, 4)
        angles = torch.arange(x.shape[1])[:, None] * self.frequencies
        table = torch.cat([angles, angles], -1)
        q, k = (self.turn(value, table.cos(), table.sin()) for value in (q, k))
        mask = torch.ones(x.shape[1], x.shape[1]).tril() == 0
        scores = (q @ k.transpose(2, 3)).masked_fill(mask, float("-inf"))
        return x + (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)

    @staticmethod
    def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return x * cos + torch.cat([-x[..., 4:], x[..., :4]], -1) * sin


def cleaned(program: Program) -> Program:
    """Runs the cleanup to its fixpoint, each pass checked on its own."""
    for _ in range(6):
        before = program
        for kind in CLEANUP:
            program = run_pass(kind(), program).after
        if program is before:
            return program
    raise AssertionError("no fixpoint after 6 rounds")


def assert_same_bits(before: Program, after: Program) -> None:
    for batch, seq, past in ((1, 1, 0), (2, 5, 3), (3, 4, 0)):
        sizes = {"batch": batch, "seq": seq, "past": past}
        known = {name: size for name, size in sizes.items() if name in before.signature.dims}
        values = random_inputs(before, known, seed=seq)
        assert all(map(is_same_bits, before(**values), after(**values)))


def count(program: Program, op: str) -> int:
    return program.text.count(f"= {op}(")


def test_tables_and_masks_of_all_layers_are_computed_once():
    torch.manual_seed(0)
    module = nn.Sequential(*(Layer() for _ in range(3)))
    program = redpass.load(
        module, example={"input": torch.randn(2, 5, 16)}, inputs=["input:float32[batch,seq,16]"]
    )
    after = cleaned(program)
    for op in ("cos", "sin", "tril"):
        assert count(program, op) >= 3
        assert count(after, op) == 1
    assert len(after.graph.nodes) < 0.8 * len(program.graph.nodes)
    assert_same_bits(program, after)


@pytest.mark.parametrize(
    ("kind", "architecture", "options"),
    [
        ("gpt_neox", "GPTNeoXForCausalLM", {}),
        (
            "modernbert",
            "ModernBertForMaskedLM",
            dict.fromkeys(("pad_token_id", "eos_token_id", "bos_token_id"), 0)
            | dict.fromkeys(("cls_token_id", "sep_token_id"), 1),
        ),
    ],
)
def test_models_keep_every_bit(tmp_path: Path, kind, architecture, options):
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **SMALL, **options)
    getattr(transformers, architecture)(config).save_pretrained(tmp_path)
    program = redpass.load(tmp_path)
    after = cleaned(program)
    assert count(after, "index.Tensor") == 0
    assert count(after, "cos") == len({"full", "sliding"} if kind == "modernbert" else {"full"})
    assert len(after.graph.nodes) < 0.85 * len(program.graph.nodes)
    assert_same_bits(program, after)
