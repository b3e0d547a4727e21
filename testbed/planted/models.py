"""Small `transformers` models of real structure, with random weights, to plant redundancy in."""

from torch import nn

from testbed.planted.record import randomise

_SIZES = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48, "vocab_size": 64}


def llama(layers: int = 3, seed: int = 0) -> nn.Module:
    """A Llama of width 32 with two key heads for four query heads, untied embeddings."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        num_hidden_layers=layers,
        num_key_value_heads=2,
        max_position_embeddings=64,
        use_cache=False,
        **_SIZES,
    )
    return randomise(LlamaForCausalLM(config), seed)


def qwen3(layers: int = 2, seed: int = 0) -> nn.Module:
    """A Qwen3 of width 32 with four query heads and two key heads of 8."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        num_hidden_layers=layers,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=64,
        use_cache=False,
        **_SIZES,
    )
    return randomise(Qwen3ForCausalLM(config), seed)


def gpt2(layers: int = 2, seed: int = 0) -> nn.Module:
    """A GPT-2 of width 32 with four heads of 8."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        n_layer=layers, n_head=4, n_embd=32, n_positions=64, vocab_size=64, use_cache=False,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return randomise(GPT2LMHeadModel(config), seed)


def bert(layers: int = 2, seed: int = 0) -> nn.Module:
    """A BERT encoder of width 32 (GELU, norms after the residual adds), without pooler."""
    from transformers import BertConfig, BertModel

    config = BertConfig(num_hidden_layers=layers, max_position_embeddings=64, **_SIZES)
    return randomise(BertModel(config, add_pooling_layer=False), seed)


def opt(layers: int = 2, seed: int = 0) -> nn.Module:
    """An OPT of width 32 (ReLU feed-forward)."""
    from transformers import OPTConfig, OPTForCausalLM

    config = OPTConfig(
        num_hidden_layers=layers, hidden_size=32, word_embed_proj_dim=32, ffn_dim=48,
        num_attention_heads=4, vocab_size=64, max_position_embeddings=64, use_cache=False,
        pad_token_id=1, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return randomise(OPTForCausalLM(config), seed)


def mixtral(layers: int = 2, seed: int = 0) -> nn.Module:
    """A Mixtral of width 32 with four experts, two for each token."""
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        num_hidden_layers=layers,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=64,
        use_cache=False,
        **_SIZES,
    )
    module = MixtralForCausalLM(config)
    # The grouped matrix product that is the default takes no float64.
    module.set_experts_implementation("eager")
    return randomise(module, seed)
