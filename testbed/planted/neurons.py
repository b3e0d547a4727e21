"""Neurons and channels that repeat others, or say nothing."""

import copy

import torch
from torch import Tensor, nn

from testbed.planted import models
from testbed.planted.record import Finding, Planted, features, linear, randomise, tokens

# Neuron number to the number of the one it repeats, and the scale.
Copies = dict[int, tuple[int, float]]


def rescaled_neurons_relu() -> Planted:
    """An OPT with neurons equal to another up to a positive scale, which ReLU passes through.

    The trap is a neuron that is minus another: ReLU keeps the other half of it.
    """
    module = models.opt(seed=4)
    into: Copies = {9: (3, 2.0), 20: (3, 0.25), 31: (30, 1.0)}
    repeat_neurons(module.model.decoder.layers[0].fc1, into | {40: (41, -1.0)})
    where = ("model.decoder.layers.0.fc1", "model.decoder.layers.0.fc2")
    groups = {"groups": (((3, 1.0), (9, 2.0), (20, 0.25)), ((30, 1.0), (31, 1.0)))}
    trap = Finding(
        "rescaled neurons",
        where,
        {"groups": (((41, 1.0), (40, -1.0)),)},
        removable=False,
        why="ReLU does not commute with a negative scale",
    )
    reduced = copy.deepcopy(module)
    inner = reduced.model.decoder.layers[0]
    inner.fc1, inner.fc2 = merge_neurons(inner.fc1, inner.fc2, into)
    findings = (Finding("rescaled neurons", where, groups), trap)
    name = "rescaled_neurons_relu"
    return Planted(name, module, tokens(), findings, "within tolerance", reduced)


def duplicated_neurons_gelu() -> Planted:
    """A BERT with neurons equal to another. The trap is a rescaled one, which GELU distorts."""
    module = models.bert(seed=5)
    into: Copies = {7: (2, 1.0), 33: (2, 1.0), 47: (46, 1.0)}
    repeat_neurons(module.encoder.layer[1].intermediate.dense, into | {12: (11, 2.0)})
    where = ("encoder.layer.1.intermediate.dense", "encoder.layer.1.output.dense")
    trap = Finding(
        "rescaled neurons",
        where,
        {"groups": (((11, 1.0), (12, 2.0)),)},
        removable=False,
        why="GELU does not commute with a scale",
    )
    reduced = copy.deepcopy(module)
    inner = reduced.encoder.layer[1]
    inner.intermediate.dense, inner.output.dense = merge_neurons(
        inner.intermediate.dense, inner.output.dense, into
    )
    found = Finding("duplicated neurons", where, {"groups": ((2, 7, 33), (46, 47))})
    name = "duplicated_neurons_gelu"
    return Planted(name, module, tokens(), (found, trap), "within tolerance", reduced)


def repeat_neurons(up: nn.Linear, copies: Copies) -> None:
    """Overwrite each neuron of `copies` by its scaled source."""
    for target, (source, scale) in copies.items():
        up.weight[target] = scale * up.weight[source]
        up.bias[target] = scale * up.bias[source]


def merge_neurons(up: nn.Linear, down: nn.Linear, into: Copies) -> tuple[nn.Linear, nn.Linear]:
    """Remove each neuron of `into`; its outgoing weights, scaled, go to the one it repeats."""
    outgoing = down.weight.clone()
    for target, (source, scale) in into.items():
        outgoing[:, source] += scale * outgoing[:, target]
    kept = [row for row in range(up.out_features) if row not in into]
    return linear(up.weight[kept], up.bias[kept]), linear(outgoing[:, kept], down.bias)


class TwoConvolutions(nn.Module):
    """Convolution, batch norm, ReLU, convolution: `x` `[n, 3, h, w]`."""

    def __init__(self, width: int, padding: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, 4, 3, padding=padding)

    def forward(self, x: Tensor) -> Tensor:
        """`[n, 3, h, w]` to `[n, 4, h, w]`, less the border where nothing pads it."""
        return self.conv2(torch.relu(self.norm(self.conv1(x))))


def _with_constants(padding: int, seed: int) -> TwoConvolutions:
    module = randomise(TwoConvolutions(8, padding), seed)
    random = torch.Generator().manual_seed(seed)
    module.norm.running_mean.copy_(torch.randn(8, generator=random))
    module.norm.running_var.copy_(torch.rand(8, generator=random) + 0.5)
    # Gain zero leaves the bias: channel 2 is zero, 4 is cut to zero by ReLU, 6 is always 0.75.
    for channel, bias in ((2, 0.0), (4, -0.5), (6, 0.75)):
        module.norm.weight[channel] = 0.0
        module.norm.bias[channel] = bias
    return module


def constant_channels() -> Planted:
    """Channels that are always zero, and a constant one that the next bias can take in."""
    module = _with_constants(padding=0, seed=6)
    reduced = without_channels(module, zero=(2, 4), constant={6: 0.75})
    findings = (
        Finding("zero channels", ("conv1", "norm", "conv2"), {"channels": (2, 4)}),
        Finding("constant channels", ("conv1", "norm", "conv2"), {"channels": {6: 0.75}}),
    )
    inputs = features(2, 3, 9, 9)
    return Planted("constant_channels", module, inputs, findings, "within tolerance", reduced)


def constant_channels_padded() -> Planted:
    """As `constant_channels`, but zero padding makes the constant's share differ at the border."""
    module = _with_constants(padding=1, seed=7)
    reduced = without_channels(module, zero=(2, 4), constant={})
    findings = (
        Finding("zero channels", ("conv1", "norm", "conv2"), {"channels": (2, 4)}),
        Finding(
            "constant channels",
            ("conv1", "norm", "conv2"),
            {"channels": {6: 0.75}},
            removable=False,
            why="zero padding makes the constant's share differ at the border",
        ),
    )
    name, inputs = "constant_channels_padded", features(2, 3, 9, 9)
    return Planted(name, module, inputs, findings, "within tolerance", reduced)


def without_channels(
    module: TwoConvolutions, zero: tuple[int, ...], constant: dict[int, float]
) -> TwoConvolutions:
    """Remove channels; constants go into the second bias, as if nothing padded its input."""
    kept = [channel for channel in range(8) if channel not in zero and channel not in constant]
    reduced = TwoConvolutions(len(kept), module.conv2.padding[0]).eval().requires_grad_(False)
    state = {}
    for name, value in module.state_dict().items():
        if name == "conv2.weight":
            value = value[:, kept]
        elif name == "conv2.bias":
            shares = [
                value_of * module.conv2.weight[:, c].sum((1, 2)) for c, value_of in constant.items()
            ]
            value = value + sum(shares, torch.zeros_like(value))
        elif value.ndim:
            value = value[kept]
        state[name] = value
    reduced.load_state_dict(state)
    return reduced
