"""The language models: their recipes, and how they are built and trained."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn

from testbed import corpus
from testbed.loop import Schedule, Spent, batch_rows, fit

VOCABULARY = 2048
CONTEXT = 256


@dataclass(frozen=True)
class LanguageRecipe:
    """A causal LM: the `transformers` classes, the config's fields, and the training schedule."""

    name: str
    config_class: str
    model_class: str
    config: Mapping[str, object]
    schedule: Schedule


GPT2 = LanguageRecipe(
    name="gpt2",
    config_class="GPT2Config",
    model_class="GPT2LMHeadModel",
    config={
        "n_layer": 12,
        "n_head": 12,
        "n_embd": 192,
        "n_positions": CONTEXT,
        "activation_function": "gelu_pytorch_tanh",
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
    },
    schedule=Schedule(cycles=(2000, 2500), batch=4, learning_rate=1.5e-3, warmup=100, seed=1),
)

# Three query heads read each key head: large enough for clusters to form inside a group.
QWEN3 = LanguageRecipe(
    name="qwen3",
    config_class="Qwen3Config",
    model_class="Qwen3ForCausalLM",
    config={
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
        "head_dim": 16,
        "hidden_size": 192,
        "intermediate_size": 512,
        "max_position_embeddings": CONTEXT,
        "tie_word_embeddings": True,
    },
    schedule=Schedule(cycles=(2000, 2500), batch=4, learning_rate=1.5e-3, warmup=100, seed=2),
)

MIXTRAL = LanguageRecipe(
    name="mixtral",
    config_class="MixtralConfig",
    model_class="MixtralForCausalLM",
    config={
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "hidden_size": 128,
        "intermediate_size": 192,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "output_router_logits": True,
        "router_aux_loss_coef": 0.01,
        "max_position_embeddings": CONTEXT,
        "sliding_window": None,
        # The default of 0.02 is meant for widths of thousands and starts slowly here.
        "initializer_range": 0.06,
        "tie_word_embeddings": True,
    },
    schedule=Schedule(cycles=(1500,), batch=4, learning_rate=2e-3, warmup=100, seed=3),
)

RECIPES = {recipe.name: recipe for recipe in (GPT2, QWEN3, MIXTRAL)}


def build(recipe: LanguageRecipe, end: int = 0) -> nn.Module:
    """An untrained model in float32; `end` is the end-of-text token."""
    import transformers

    torch.manual_seed(recipe.schedule.seed)
    special = {"bos_token_id": end, "eos_token_id": end, "pad_token_id": None}
    config_class = getattr(transformers, recipe.config_class)
    config = config_class(vocab_size=VOCABULARY, **special, **recipe.config)
    return getattr(transformers, recipe.model_class)(config).float()


def train(recipe: LanguageRecipe, work: Path) -> tuple[nn.Module, Spent]:
    """Train from scratch on the corpus's training split, with checkpoints under `work`."""
    tokenizer = corpus.shared_tokenizer(VOCABULARY)
    module = build(recipe, tokenizer.eos_token_id)
    rows = training_rows()

    def loss(module: nn.Module, step: int) -> Tensor:
        batch = rows[batch_rows(len(rows), recipe.schedule, step)]
        return module(input_ids=batch, labels=batch, use_cache=False).loss

    return module, fit(module, loss, recipe.schedule, work / f"{recipe.name}.pt")


@cache
def training_rows() -> Tensor:
    """Training windows, int64 `[count, CONTEXT]`."""
    tokenizer = corpus.shared_tokenizer(VOCABULARY)
    return torch.from_numpy(corpus.windows(tokenizer, "training", CONTEXT).astype("int64"))
