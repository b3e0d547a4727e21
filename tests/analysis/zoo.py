"""Small models of many architectures, built from configs with random weights, as programs."""

from __future__ import annotations

import functools
import logging
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from redpass.frontend import load as load_program
from redpass.program import Program

WIDE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 99}
GATED = WIDE | {"intermediate_size": 64, "pad_token_id": 0}
IMAGE = {"image_size": 16, "patch_size": 4, "num_channels": 3} | {
    k: v for k, v in WIDE.items() if k != "vocab_size"
}


def text(name: str, head: str = "Model", config: str = "", **options: Any) -> Program:
    """A Hugging Face model by the stem of its classes' names, as `load` makes it."""
    import transformers

    logging.getLogger("transformers").setLevel(logging.ERROR)
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = getattr(transformers, f"{config or name}Config")(**options)
        return program(getattr(transformers, name + head)(made))


image = text


def program(module: nn.Module, example: Mapping[str, Tensor] | None = None) -> Program:
    """Traces `module` with weights that hide no mistake: no gain is one, no bias zero."""
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        parameter.data.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return load_program(module.eval(), example=example)


def _llama() -> Program:
    return text("Llama", "ForCausalLM", **GATED, num_key_value_heads=2)


def _whisper_encoder() -> Program:
    import transformers

    torch.manual_seed(0)
    config = transformers.WhisperConfig(
        vocab_size=99, d_model=32, encoder_layers=2, encoder_attention_heads=4,
        encoder_ffn_dim=64, num_mel_bins=8, max_source_positions=10, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    return program(transformers.models.whisper.modeling_whisper.WhisperEncoder(config))


def _dit() -> Program:
    import diffusers

    torch.manual_seed(0)
    return program(
        diffusers.DiTTransformer2DModel(
            num_attention_heads=4, attention_head_dim=8, in_channels=4, out_channels=8,
            num_layers=2, sample_size=8, patch_size=2, num_embeds_ada_norm=10,
        )
    )  # fmt: skip


class ResNet(nn.Module):
    """Two residual stages of a convolutional network, the second with a projection shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8))
        self.one = _Block(8, 8, 1)
        self.two = _Block(8, 16, 2)
        self.three = _Block(16, 16, 1)
        self.head = nn.Linear(16, 10)

    def forward(self, pixel_values: Tensor) -> Tensor:
        x = torch.relu(self.stem(pixel_values))
        x = self.three(self.two(self.one(x)))
        found: Tensor = self.head(x.mean((2, 3)))
        return found


class _Block(nn.Module):
    def __init__(self, width: int, out: int, stride: int) -> None:
        super().__init__()
        self.a = nn.Conv2d(width, out, 3, stride, 1, bias=False)
        self.na = nn.BatchNorm2d(out)
        self.b = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.nb = nn.BatchNorm2d(out)
        same = width == out and stride == 1
        self.short = nn.Identity() if same else nn.Conv2d(width, out, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.nb(self.b(torch.relu(self.na(self.a(x)))))
        return torch.relu(y + self.short(x))


def _resnet() -> Program:
    torch.manual_seed(0)
    return program(ResNet(), {"pixel_values": torch.randn(2, 3, 16, 16)})


GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 99}
OPT = {"word_embed_proj_dim": 32, "ffn_dim": 64, "pad_token_id": 0} | WIDE

BUILDERS: dict[str, Callable[[], Program]] = {
    "llama": _llama,
    "qwen3": lambda: text("Qwen3", "ForCausalLM", **GATED, num_key_value_heads=2, head_dim=8),
    "gemma3": lambda: text(
        "Gemma3", "ForCausalLM", "Gemma3Text", **GATED, num_key_value_heads=1, head_dim=8,
        sliding_window=4, layer_types=["sliding_attention", "full_attention"],
    ),
    "gpt2": lambda: text("GPT2", "LMHeadModel", **GPT2),
    "opt": lambda: text("OPT", "ForCausalLM", **OPT),
    "gpt_neox": lambda: text("GPTNeoX", "ForCausalLM", **GATED),
    "phi": lambda: text("Phi", "ForCausalLM", **GATED),
    "falcon": lambda: text("Falcon", "ForCausalLM", **WIDE, multi_query=True, parallel_attn=True),
    "falcon_new": lambda: text(
        "Falcon", "ForCausalLM", **WIDE, new_decoder_architecture=True, num_kv_heads=2
    ),
    "falcon_rw": lambda: text(
        "Falcon", "ForCausalLM", **WIDE, alibi=True, multi_query=False, parallel_attn=False,
        bias=True,
    ),
    "bloom": lambda: text("Bloom", "ForCausalLM", hidden_size=32, n_layer=2, n_head=4,
                          vocab_size=99),
    "mixtral": lambda: text(
        "Mixtral", "ForCausalLM", **GATED, num_key_value_heads=2, num_local_experts=4
    ),
    "bert": lambda: text("Bert", **GATED),
    "mpnet": lambda: text("MPNet", **GATED),
    "modernbert": lambda: text(
        "ModernBert", **GATED | {"num_hidden_layers": 3}, global_attn_every_n_layers=2,
        local_attention=4, cls_token_id=1, sep_token_id=2, bos_token_id=1, eos_token_id=2,
    ),
    "vit": lambda: image("ViT", **IMAGE, intermediate_size=64),
    "dinov2": lambda: image("Dinov2", **IMAGE, mlp_ratio=2),
    "whisper_encoder": _whisper_encoder,
    "dit": _dit,
}  # fmt: skip
"""The architectures that structure must be found on."""

MORE: dict[str, Callable[[], Program]] = {
    "phi3": lambda: text("Phi3", "ForCausalLM", **GATED, num_key_value_heads=2),
    "qwen2": lambda: text("Qwen2", "ForCausalLM", **GATED, num_key_value_heads=2),
    "gptj": lambda: text("GPTJ", "ForCausalLM", **GPT2, rotary_dim=4),
    "gpt_bigcode": lambda: text("GPTBigCode", "ForCausalLM", **GPT2),
    "starcoder2": lambda: text("Starcoder2", "ForCausalLM", **GATED, num_key_value_heads=2),
    "cohere": lambda: text("Cohere", "ForCausalLM", **GATED, num_key_value_heads=2),
    "olmo2": lambda: text("Olmo2", "ForCausalLM", **GATED, num_key_value_heads=2),
    "granite": lambda: text("Granite", "ForCausalLM", **GATED, residual_multiplier=0.22),
    "gemma2": lambda: text(
        "Gemma2", "ForCausalLM", **GATED, num_key_value_heads=2, head_dim=8
    ),
    "stablelm": lambda: text("StableLm", "ForCausalLM", **GATED, num_key_value_heads=2),
    "mpt": lambda: text("Mpt", "ForCausalLM", d_model=32, n_heads=4, n_layers=2, vocab_size=99),
    "distilbert": lambda: text("DistilBert", dim=32, n_layers=2, n_heads=4, hidden_dim=64,
                               vocab_size=99),
    "roberta": lambda: text("Roberta", **GATED),
    "albert": lambda: text("Albert", **GATED, embedding_size=16),
    "electra": lambda: text("Electra", **GATED, embedding_size=16),
    "deberta_v2": lambda: text("DebertaV2", **GATED, relative_attention=True,
                               pos_att_type=["c2p", "p2c"], position_buckets=8),
    "t5_encoder": lambda: text("T5", "EncoderModel", d_model=32, d_kv=8, d_ff=64, num_layers=2,
                               num_heads=4, vocab_size=99),
    "clip_vision": lambda: image("CLIPVision", **IMAGE, intermediate_size=64),
    "swin": lambda: image("Swin", image_size=32, patch_size=2, embed_dim=16,
                          depths=[2, 2], num_heads=[2, 4], window_size=4),
    "convnext": lambda: image("ConvNext", depths=[1, 1, 2, 1],
                              hidden_sizes=[8, 16, 16, 32]),
    "mamba": lambda: text("Mamba", "ForCausalLM", hidden_size=32, num_hidden_layers=2,
                          vocab_size=99, state_size=4),
    "qwen3_moe": lambda: text("Qwen3Moe", "ForCausalLM", **GATED, num_key_value_heads=2,
                              moe_intermediate_size=16, num_experts=4, num_experts_per_tok=2,
                              head_dim=8),
    "gpt_oss": lambda: text("GptOss", "ForCausalLM", **GATED, num_key_value_heads=2, head_dim=8,
                            num_local_experts=4, num_experts_per_tok=2),
    "resnet": _resnet,
}  # fmt: skip


@functools.cache
def load(name: str) -> Program:
    """Returns the small program of architecture `name`, traced once a test run."""
    return (BUILDERS | MORE)[name]()
