"""Arithmetic that can be done once, ahead of time, or in fewer steps."""

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.fusion import fuse_conv_bn_eval

from testbed.planted import models
from testbed.planted.neurons import TwoConvolutions
from testbed.planted.record import Finding, Planted, features, linear, randomise, tokens


def rank_deficient() -> Planted:
    """A Llama with `q_proj` of layer 0 of rank 5, `down_proj` of layer 1 of rank 7, both of 32.

    The trap has rank 28: two thin factors of it would be larger than the matrix.
    """
    module = models.llama(seed=14)
    reduced = copy.deepcopy(module)
    ranks = {
        "model.layers.0.self_attn.q_proj": 5,
        "model.layers.1.mlp.down_proj": 7,
        "model.layers.2.self_attn.o_proj": 28,
    }
    findings = [_plant_rank(module, reduced, place, rank) for place, rank in ranks.items()]
    name = "rank_deficient"
    return Planted(name, module, tokens(), tuple(findings), "within tolerance", reduced)


def _plant_rank(module: nn.Module, reduced: nn.Module, place: str, rank: int) -> Finding:
    weight = module.get_submodule(place).weight
    left, values, right = torch.linalg.svd(weight.double(), full_matrices=False)
    up, down = left[:, :rank] * values[:rank], right[:rank]
    weight.copy_(up @ down)
    rows, columns = weight.shape
    if rank * (rows + columns) >= rows * columns:
        why = "two factors of this rank hold more than the matrix"
        reduced.get_submodule(place).weight.copy_(weight)
        return Finding("low rank", (place,), {"rank": rank}, removable=False, why=why)
    factors = nn.Sequential(linear(down.float(), None), linear(up.float(), None))
    reduced.set_submodule(place, factors)
    return Finding("low rank", (place,), {"rank": rank})


class WrittenTwice(nn.Module):
    """A gated sum whose halves start with the same computation; `once` does it one time."""

    def __init__(self, once: bool) -> None:
        super().__init__()
        self.once = once
        self.norm = nn.LayerNorm(16)
        self.inner = nn.Linear(16, 24)
        self.left = nn.Linear(24, 16)
        self.right = nn.Linear(24, 16)

    def forward(self, x: Tensor) -> Tensor:
        """`[n, 16]` to `[n, 16]`."""
        first = functional.silu(self.inner(self.norm(x)))
        second = first if self.once else functional.silu(self.inner(self.norm(x)))
        # Another activation of the same projection is not the same computation.
        other = functional.gelu(self.inner(self.norm(x)))
        return self.left(first) * torch.sigmoid(self.right(second)) + self.left(other)


def duplicated_subgraph() -> Planted:
    """The same norm, projection and activation written twice, the first two a third time."""
    module = randomise(WrittenTwice(once=False), seed=15)
    reduced = WrittenTwice(once=True).eval().requires_grad_(False)
    reduced.load_state_dict(module.state_dict())
    detail = {"copies": {"norm": 3, "inner": 3, "silu": 2}}
    finding = Finding("equal subexpressions", ("norm", "inner"), detail)
    inputs = features(5, 16)
    return Planted("duplicated_subgraph", module, inputs, (finding,), "same bits", reduced)


def batchnorm_after_conv() -> Planted:
    """A batch norm directly behind a convolution, with the running statistics of some data."""
    module = randomise(TwoConvolutions(8, padding=1), seed=16)
    random = torch.Generator().manual_seed(16)
    module.norm.running_mean.copy_(torch.randn(8, generator=random))
    module.norm.running_var.copy_(torch.rand(8, generator=random) + 0.5)
    reduced = copy.deepcopy(module)
    reduced.conv1, reduced.norm = fuse_conv_bn_eval(module.conv1, module.norm), nn.Identity()
    finding = Finding("batch norm after convolution", ("conv1", "norm"))
    name, inputs = "batchnorm_after_conv", features(2, 3, 9, 9)
    return Planted(name, module, inputs, (finding,), "within tolerance", reduced)


class LinearChain(nn.Module):
    """Two linear layers with nothing between, ReLU, and two more around a narrow middle."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Sequential(nn.Linear(24, 64), nn.Linear(64, 32))
        self.narrow = nn.Sequential(nn.Linear(32, 4), nn.Linear(4, 32))

    def forward(self, x: Tensor) -> Tensor:
        """`[n, 24]` to `[n, 32]`."""
        return self.narrow(torch.relu(self.wide(x)))


def linear_into_linear() -> Planted:
    """Two linear layers that are one. The trap is a pair with a narrow middle."""
    module = randomise(LinearChain(), seed=17)
    reduced = copy.deepcopy(module)
    first, second = module.wide
    weight = second.weight.double() @ first.weight.double()
    bias = second.weight.double() @ first.bias.double() + second.bias
    reduced.wide = linear(weight.float(), bias.float())
    findings = (
        Finding("linear into linear", ("wide.0", "wide.1")),
        Finding(
            "linear into linear",
            ("narrow.0", "narrow.1"),
            removable=False,
            why="the product holds more than the two factors",
        ),
    )
    inputs = features(5, 24)
    return Planted("linear_into_linear", module, inputs, findings, "within tolerance", reduced)


def norm_gain_before_linear() -> Planted:
    """A Llama whose norm gains are not one: each can go into the projections that read the norm."""
    module = models.llama(layers=2, seed=18)
    reduced = copy.deepcopy(module)
    findings = []
    for number, layer in enumerate(reduced.model.layers):
        place = f"model.layers.{number}"
        attention, feed_forward = layer.self_attn, layer.mlp
        _fold(layer.input_layernorm, attention.q_proj, attention.k_proj, attention.v_proj)
        _fold(layer.post_attention_layernorm, feed_forward.gate_proj, feed_forward.up_proj)
        readers = [f"{place}.self_attn.{p}_proj" for p in "qkv"]
        findings.append(Finding("norm gain", (f"{place}.input_layernorm", *readers)))
        readers = [f"{place}.mlp.{p}_proj" for p in ("gate", "up")]
        findings.append(Finding("norm gain", (f"{place}.post_attention_layernorm", *readers)))
    _fold(reduced.model.norm, reduced.lm_head)
    findings.append(Finding("norm gain", ("model.norm", "lm_head")))
    name = "norm_gain_before_linear"
    return Planted(name, module, tokens(), tuple(findings), "within tolerance", reduced)


def _fold(norm: nn.Module, *readers: nn.Linear) -> None:
    for reader in readers:
        reader.weight.mul_(norm.weight)
    norm.weight.fill_(1.0)


def norm_bias_before_linear() -> Planted:
    """A layer norm whose gain and bias can go into the weight and bias of the linear behind it."""
    norm, layer = randomise(nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 24)), seed=19)
    module = NormThenLinear(norm, layer)
    weight = layer.weight.double() * norm.weight.double()
    bias = layer.bias + layer.weight.double() @ norm.bias.double()
    reduced = NormThenLinear(nn.LayerNorm(16).eval(), linear(weight.float(), bias.float()))
    finding = Finding("norm gain", ("norm", "linear"), {"bias": True})
    inputs, exactness = features(5, 16), "within tolerance"
    return Planted("norm_bias_before_linear", module, inputs, (finding,), exactness, reduced.eval())


class NormThenLinear(nn.Module):
    """A norm read by one linear layer and nothing else."""

    def __init__(self, norm: nn.Module, linear: nn.Module) -> None:
        super().__init__()
        self.norm = norm
        self.linear = linear
        self.eval().requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        """`[n, 16]` to `[n, 24]`."""
        return functional.silu(self.linear(self.norm(x)))
