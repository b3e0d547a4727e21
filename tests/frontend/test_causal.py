"""Causal LMs: the same graph for prefill and decode gives what transformers gives."""

import functools
import inspect

import pytest
import torch

from redpass.frontend import load
from redpass.frontend.causal import is_causal

transformers = pytest.importorskip("transformers")

SIZE = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "vocab_size": 96, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GQA = {"num_key_value_heads": 2, "head_dim": 8}
SMALL = {
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "vocab_size": 96,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
WINDOW = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
TYPES = ["sliding_attention", "full_attention"]
CONFIGS = {
    "llama": {**SIZE, "num_key_value_heads": 2},
    "qwen3": {**SIZE, **GQA, **WINDOW},
    "gemma3_text": {**SIZE, **GQA, "sliding_window": 4, "layer_types": TYPES},
    "gpt2": {**SMALL, "n_positions": 64},
    "opt": {**SIZE, "ffn_dim": 48, "word_embed_proj_dim": 32},
    "gpt_neox": SIZE,
    "phi": SIZE,
    "falcon": {**SIZE, "intermediate_size": None},
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4, "vocab_size": 96},
    "mixtral": {**SIZE, "num_key_value_heads": 2, "num_local_experts": 4},
}  # fmt: skip
ALWAYS = ("llama", "gemma3_text", "gpt2", "bloom", "mixtral")
NAMES = [n if n in ALWAYS else pytest.param(n, marks=pytest.mark.slow) for n in CONFIGS]
"""The rest of the architectures differ from these five in ways the tracer does not see."""

CALLS = [(1, 0, 5), (3, 0, 5), (1, 4, 1), (3, 4, 1), (1, 3, 2), (3, 3, 2), (2, 0, 1), (1, 9, 7)]


@functools.cache
def traced(name):
    torch.manual_seed(0)
    given = {k: v for k, v in CONFIGS[name].items() if v is not None}
    config = transformers.AutoConfig.for_model(name, **given)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    return model, load(model)


def split(model, ids, mask, past):
    """Positions and inputs of the tokens before and after `past`."""
    takes = "position_ids" in inspect.signature(model.forward).parameters
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    cut = [slice(0, past), slice(past, None)]
    return [
        {"input_ids": ids[:, c], "attention_mask": mask[:, : c.stop]}
        | ({"position_ids": positions[:, c]} if takes else {})
        for c in cut
    ]


def empty_cache(program, batch):
    sizes = {"batch": batch, "past": 0}
    ports = [program.signature.input(name) for name, _ in program.signature.state]
    return {p.name: torch.zeros([sizes.get(s, s) for s in p.shape], dtype=p.dtype) for p in ports}


def next_cache(program, outputs):
    names = [port.name for port in program.signature.outputs]
    return {source: outputs[names.index(result)] for source, result in program.signature.state}


@pytest.mark.parametrize("name", NAMES)
def test_cache_in_and_out_equals_transformers(name):
    model, program = traced(name)
    for batch, past, seq in CALLS:
        ids = torch.randint(
            3, 96, (batch, past + seq), generator=torch.Generator().manual_seed(past)
        )
        mask = torch.ones_like(ids)
        if batch == 3:
            mask[1, :2] = 0
        first, second = split(model, ids, mask, past)
        cache = transformers.DynamicCache(config=model.config)
        state = empty_cache(program, batch)
        with torch.no_grad():
            if past:
                model(**first, past_key_values=cache, use_cache=True)
                state = next_cache(program, program(**first, **state))
            expected = model(**second, past_key_values=cache, use_cache=True).logits
        found = program(**second, **state)[0]
        seen = mask[:, past:].bool()
        worst = (found - expected)[seen].abs().max() / expected.abs().max()
        assert worst <= 2e-6, f"batch {batch}, past {past}, seq {seq}: {worst:.1e}"


def test_the_interface_is_the_agreed_one():
    _, program = traced("llama")
    assert [str(p) for p in program.signature.inputs[:4]] == [
        "input_ids:int64[batch,seq]",
        "attention_mask:int64[batch,past + seq]",
        "position_ids:int64[batch,seq]",
        "past_key_values.0.key:float32[batch,2,past,8]",
    ]
    outputs = [str(p) for p in program.signature.outputs]
    assert outputs[0] == "logits:float32[batch,seq,96]"
    assert outputs[1] == "present.0.key:float32[batch,2,past + seq,8]"
    assert program.signature.state[0] == ("past_key_values.0.key", "present.0.key")
    assert program.signature.dims["past"] == (0, None)
    assert program.origin.task == "causal-lm"


def test_no_concatenation_with_an_empty_tensor_is_left():
    _, program = traced("llama")
    assert "zeros" not in program.text
    assert "empty" not in program.text
    assert not any(w.numel() == 0 for w in program.weights.values())


def test_recognised_by_interface_not_by_name():
    model, _ = traced("llama")
    assert is_causal(model, list(inspect.signature(model.forward).parameters))
    assert not is_causal(model.model, list(inspect.signature(model.model.forward).parameters))


def test_experts_become_batched_products_and_the_model_keeps_its_choice():
    model, program = traced("mixtral")
    assert "bmm" in program.text
    assert "grouped_mm" not in program.text
    assert model.get_experts_implementation() == {"": "grouped_mm"}
