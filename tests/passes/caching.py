"""Small language models with a cache, and runs of them call by call."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
import transformers
from checking import plan_pass
from torch import Tensor

import redpass
from redpass.data import Batches
from redpass.plan import Pass, Plan
from redpass.program import Program

VOCABULARY = 64
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
         "vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1,
         "eos_token_id": 2}  # fmt: skip
GATED = SMALL | {"intermediate_size": 64, "max_position_embeddings": 64}
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", {
        "n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": VOCABULARY, "n_positions": 64,
        "bos_token_id": 1, "eos_token_id": 2}),
    "llama": ("LlamaConfig", "LlamaForCausalLM", GATED | {"num_key_value_heads": 2}),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", GATED | {
        "num_key_value_heads": 2, "head_dim": 8}),
    "gpt_neox": ("GPTNeoXConfig", "GPTNeoXForCausalLM", GATED | {"rotary_pct": 0.5}),
    "gptj": ("GPTJConfig", "GPTJForCausalLM", {
        "n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": VOCABULARY, "n_positions": 64,
        "rotary_dim": 4, "bos_token_id": 1, "eos_token_id": 2}),
    "bloom": ("BloomConfig", "BloomForCausalLM", {
        "hidden_size": 32, "n_layer": 2, "n_head": 4, "vocab_size": VOCABULARY,
        "bos_token_id": 1, "eos_token_id": 2}),
}  # fmt: skip


def module(name: str, **changed: Any) -> torch.nn.Module:
    """A model with random weights that hide no mistake: no gain is one, no bias zero."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    torch.manual_seed(0)
    config, model, options = MODELS[name]
    made = getattr(transformers, model)(getattr(transformers, config)(**options | changed)).eval()
    generator = torch.Generator().manual_seed(1)
    for parameter in made.parameters():
        parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return made


@cache
def language_model(name: str) -> Program:
    """The program of `module(name)`."""
    return redpass.load(module(name))


def texts(batches: int = 4) -> Batches:
    """Random tokens, the last row of each batch padded on the left."""
    generator = torch.Generator().manual_seed(0)
    items = []
    for _ in range(batches):
        ids = torch.randint(3, VOCABULARY, (4, 32), generator=generator)
        mask = torch.ones_like(ids)
        mask[3, :5] = 0
        items.append({"input_ids": ids, "attention_mask": mask})
    return Batches(tuple(items), "random tokens")


def plan_with(pass_: Pass, program: Program) -> Plan:
    """Plans on random tokens, with the analyses that the pass asks for."""
    return plan_pass(pass_, program, texts())


def decode(
    program: Program, ids: Tensor, calls: Sequence[int] = (6, 1, 1, 4), padding: int = 0
) -> tuple[Tensor, dict[str, Tensor]]:
    """Gives the tokens in several calls; returns all logits and the cache at the end.

    Args:
        padding: tokens at the start of the first row that are masked.
    """
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    ports = {port.name: port for port in program.signature.inputs}
    state = {name: _empty(ports[name].shape, len(ids)) for name, _ in program.signature.state}
    names, logits, at = [port.name for port in program.signature.outputs], [], 0
    for count in calls:
        given = {"input_ids": ids[:, at : at + count], "attention_mask": mask[:, : at + count]}
        if "position_ids" in ports:
            given["position_ids"] = positions[:, at : at + count].contiguous()
        found = dict(zip(names, program(**given, **state), strict=True))
        logits.append(found["logits"])
        state = {before: found[after] for before, after in program.signature.state}
        at += count
    return torch.cat(logits, 1)[:, padding:], state


def _empty(shape: Sequence[int | str], batch: int) -> Tensor:
    return torch.zeros([batch, *(size if isinstance(size, int) else 0 for size in shape[1:])])
