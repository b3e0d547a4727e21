"""Branches and layers that add nothing new."""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from testbed.planted import models
from testbed.planted.record import Finding, Planted, randomise, tokens


class Nothing(nn.Module):
    """Stands for a dropped branch: zeros of its input's shape, then None for further outputs."""

    def __init__(self, outputs: int = 1) -> None:
        super().__init__()
        self.outputs = outputs

    def forward(self, hidden_states: Tensor, *_: object, **__: object) -> object:
        """Zeros like `hidden_states`."""
        zeros = torch.zeros_like(hidden_states)
        return zeros if self.outputs == 1 else (zeros, *[None] * (self.outputs - 1))


def zero_branches_llama() -> Planted:
    """A Llama with a zero attention branch in layer 1 and a zero feed-forward branch in layer 2."""
    module = models.llama(seed=8)
    layers = module.model.layers
    layers[1].self_attn.o_proj.weight.zero_()
    layers[2].mlp.down_proj.weight.zero_()
    reduced = copy.deepcopy(module)
    reduced.model.layers[1].self_attn = Nothing(2)
    reduced.model.layers[2].mlp = Nothing()
    where = {"model.layers.1.self_attn": "attention", "model.layers.2.mlp": "feed-forward"}
    return _zero("zero_branches_llama", module, reduced, where)


def zero_branches_gpt2() -> Planted:
    """A GPT-2 with zero feed-forward in layer 0 and zero attention in layer 1, biases included.

    The trap is layer 1's feed-forward: its output weights are zero and its bias is not.
    """
    module = models.gpt2(seed=9)
    first, second = module.transformer.h
    for layer in (first.mlp.c_proj, second.attn.c_proj):
        layer.weight.zero_()
        layer.bias.zero_()
    second.mlp.c_proj.weight.zero_()
    reduced = copy.deepcopy(module)
    reduced.transformer.h[0].mlp = Nothing()
    reduced.transformer.h[1].attn = Nothing(2)
    where = {"transformer.h.0.mlp": "feed-forward", "transformer.h.1.attn": "attention"}
    trap = Finding(
        "zero branch",
        ("transformer.h.1.mlp",),
        {"branch": "feed-forward"},
        removable=False,
        why="the output bias is not zero: the branch is a constant",
    )
    return _zero("zero_branches_gpt2", module, reduced, where, trap)


def zero_branches_bert() -> Planted:
    """A BERT with a zero attention branch in layer 0; the norm behind the add has to stay."""
    module = models.bert(seed=10)
    dense = module.encoder.layer[0].attention.output.dense
    dense.weight.zero_()
    dense.bias.zero_()
    reduced = copy.deepcopy(module)
    reduced.encoder.layer[0].attention.self = Nothing(2)
    reduced.encoder.layer[0].attention.output.dense = Nothing()
    where = {"encoder.layer.0.attention": "attention"}
    return _zero("zero_branches_bert", module, reduced, where)


def _zero(
    name: str, module: nn.Module, reduced: nn.Module, where: dict[str, str], *traps: Finding
) -> Planted:
    found = [Finding("zero branch", (place,), {"branch": kind}) for place, kind in where.items()]
    return Planted(name, module, tokens(), (*found, *traps), "same bits", reduced)


def equal_layers() -> Planted:
    """A Llama of five layers; layer 3 has the weights of layer 1, in storage of its own."""
    module = models.llama(layers=5, seed=11)
    layers = module.model.layers
    layers[3].load_state_dict(layers[1].state_dict())
    reduced = copy.deepcopy(module)
    reduced.model.layers[3] = reduced.model.layers[1]
    where = ("model.layers.1", "model.layers.3")
    finding = Finding("equal layers", where, {"groups": ((1, 3),)})
    return Planted("equal_layers", module, tokens(), (finding,), "same bits", reduced)


def tied_weights() -> Planted:
    """A Llama whose output head is a copy of its embedding, in storage of its own."""
    module = models.llama(seed=12)
    module.lm_head.weight.copy_(module.model.embed_tokens.weight)
    return _tied("tied_weights", module, tokens(), _tie_llama, False)


def _tie_llama(module: nn.Module) -> tuple[str, str]:
    module.lm_head.weight = module.model.embed_tokens.weight
    return "model.embed_tokens.weight", "lm_head.weight"


class TransposedHead(nn.Module):
    """An embedding `[vocabulary, d]`, a layer, and a head stored as `[d, vocabulary]`."""

    def __init__(self, vocabulary: int = 64, width: int = 16) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.mix = nn.Linear(width, width)
        self.head = nn.Parameter(torch.zeros(width, vocabulary))

    def forward(self, input_ids: Tensor) -> Tensor:
        """Ids `[n, tokens]` to scores `[n, tokens, vocabulary]`."""
        return torch.tanh(self.mix(self.embedding(input_ids))) @ self.head


def tied_transposed() -> Planted:
    """A head that is the embedding's transpose, copied."""
    module = randomise(TransposedHead(), seed=13)
    module.head.copy_(module.embedding.weight.T)
    return _tied("tied_transposed", module, tokens(), _tie_transposed, True)


def _tie_transposed(module: nn.Module) -> tuple[str, str]:
    # A Parameter of the view, so that both names look at one storage.
    module.head = nn.Parameter(module.embedding.weight.detach().T, requires_grad=False)
    return "embedding.weight", "head"


def _tied(
    name: str,
    module: nn.Module,
    inputs: dict[str, Tensor],
    tie: Callable[[nn.Module], tuple[str, str]],
    transposed: bool,
) -> Planted:
    reduced = copy.deepcopy(module)
    where = tie(reduced)
    finding = Finding("equal weights", where, {"transposed": transposed})
    # A transposed operand takes another path through the matrix product, which may round otherwise.
    exactness = "within tolerance" if transposed else "same bits"
    return Planted(name, module, inputs, (finding,), exactness, reduced)
