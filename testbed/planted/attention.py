"""Heads that look at the same tokens."""

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional

from testbed.planted import models
from testbed.planted.record import Finding, Planted, features, randomise, tokens


class SharedScoreAttention(nn.Module):
    """Causal attention in which head `h` uses the scores of head `scores_of[h]`, its own values.

    With `scores_of = (0, 1, 2, ...)` this is plain multi-head attention. `x` is `[n, tokens, heads
    * size]`.
    """

    def __init__(self, size: int, scores_of: tuple[int, ...]) -> None:
        super().__init__()
        self.size = size
        width = size * len(scores_of)
        self.scorers = sorted(set(scores_of))
        self.place = [self.scorers.index(head) for head in scores_of]
        self.norm = nn.LayerNorm(width)
        self.query = nn.Linear(width, size * len(self.scorers))
        self.key = nn.Linear(width, size * len(self.scorers))
        self.value = nn.Linear(width, width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """`[n, tokens, heads * size]` to the same shape."""
        inner = self.norm(x)
        query, key = self._heads(self.query(inner)), self._heads(self.key(inner))
        scores = query @ key.transpose(-1, -2) / self.size**0.5
        future = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)
        weights = functional.softmax(scores.masked_fill(future, float("-inf")), -1)
        mixed = weights[:, self.place] @ self._heads(self.value(inner))
        return x + self.out(mixed.transpose(1, 2).flatten(2))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.size)).transpose(1, 2)


def equal_heads() -> Planted:
    """Six heads of plain multi-head attention; 0, 2 and 5 have equal Q and K, so have 1 and 4."""
    size, scores_of = 8, (0, 1, 0, 3, 1, 0)
    module = randomise(SharedScoreAttention(size, tuple(range(6))), seed=1)
    for layer in (module.query, module.key):
        for head, scorer in enumerate(scores_of):
            _copy_rows(layer, size, scorer, head)
    reduced = SharedScoreAttention(size, scores_of).eval().requires_grad_(False)
    kept = [row for head in reduced.scorers for row in range(head * size, (head + 1) * size)]
    state = copy.deepcopy(module.state_dict())
    for name in ("query.weight", "query.bias", "key.weight", "key.bias"):
        state[name] = state[name][kept]
    reduced.load_state_dict(state)
    finding = Finding("equal heads", ("query", "key"), {"clusters": ((0, 2, 5), (1, 4), (3,))})
    inputs = features(2, 10, 48)
    return Planted("equal_heads", module, inputs, (finding,), "within tolerance", reduced)


def _copy_rows(layer: nn.Linear, size: int, source: int, target: int) -> None:
    for value in (layer.weight, layer.bias):
        value[target * size : (target + 1) * size] = value[source * size : (source + 1) * size]


def equal_heads_gpt2() -> Planted:
    """A GPT-2 with equal Q and K in heads 1 and 3 of layer 0, inside the fused q, k, v."""
    module = models.gpt2(seed=2)
    fused = module.transformer.h[0].attn.c_attn
    for start in (0, 32):
        source, target = slice(start + 8, start + 16), slice(start + 24, start + 32)
        fused.weight[:, target] = fused.weight[:, source]
        fused.bias[target] = fused.bias[source]
    where = ("transformer.h.0.attn.c_attn",)
    finding = Finding("equal heads", where, {"clusters": ((0,), (1, 3), (2,)), "layer": 0})
    return Planted("equal_heads_gpt2", module, tokens(), (finding,), "within tolerance")


def equal_key_groups() -> Planted:
    """A Qwen3 layer with both key heads equal, and query heads 0, 2 and 1, 3 across the groups.

    Scores of group 1 are those of group 0, so one K head (and its half of the K cache) can go while
    both V heads stay.
    """
    module = models.qwen3(seed=3)
    attention = module.model.layers[1].self_attn
    attention.k_proj.weight[8:16] = attention.k_proj.weight[:8]
    attention.q_proj.weight[16:32] = attention.q_proj.weight[:16]
    where = ("model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.k_proj")
    detail = {"clusters": ((0, 2), (1, 3)), "key_clusters": ((0, 1),), "layer": 1}
    finding = Finding("equal heads", where, detail)
    return Planted("equal_key_groups", module, tokens(), (finding,), "within tolerance")
