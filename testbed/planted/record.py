"""A planted model: a module with a known redundancy, and a proof of what it must still compute."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

Exactness = Literal["same bits", "within tolerance"]


@dataclass(frozen=True)
class Finding:
    """One thing to find: the `kind` of redundancy, and `where`, by submodule or parameter name.

    `detail` gives the figures of its kind: groups of indices, ranks, scales. `removable` is False
    for a trap: it looks like the redundancy beside it, and changing it would change the output or
    save nothing; `why` says so.
    """

    kind: str
    where: tuple[str, ...]
    detail: Mapping[str, object] = field(default_factory=dict)
    removable: bool = True
    why: str = ""


@dataclass(frozen=True)
class Planted:
    """A float32 module, keyword inputs for it, what must be found, how exact the rest must be.

    `reduced` is the same function with the redundancy gone (None where plain modules cannot express
    that): its outputs are equal bit for bit, or within `tolerance(planted)`, as `exactness` says.
    """

    name: str
    module: nn.Module
    inputs: Mapping[str, Tensor]
    findings: tuple[Finding, ...]
    exactness: Exactness
    reduced: nn.Module | None = None


def output(module: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    """The first output tensor: logits of a language model, the last hidden state of an encoder."""
    with torch.no_grad():
        result = module(**inputs)
    return result if isinstance(result, Tensor) else result[0]


def in_double(module: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    """The output of a float64 copy. What the code casts to float32 (some norms) stays that way."""
    wide = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
    return output(copy.deepcopy(module).double(), wide)


def tolerance(planted: Planted, slack: float = 4.0) -> float:
    """Largest absolute error against `in_double` that reordered float32 arithmetic may show.

    `slack` times the error that the original float32 module itself shows, which scales with the
    model's own depth and magnitudes where a fixed figure would not.
    """
    exact = in_double(planted.module, planted.inputs)
    return slack * (output(planted.module, planted.inputs) - exact).abs().max().item()


def randomise(module: nn.Module, seed: int) -> nn.Module:
    """Fresh weights, in evaluation mode: nothing is zero, one or equal that was not planted.

    Default initial values leave biases at zero and gains at one, which a pass could mistake for
    something to find.
    """
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in module.parameters():
            noise = torch.randn(value.shape, generator=random)
            is_gain = value.ndim < 2 and bool((value == 1).all())
            fan_in = value[0].numel() if value.ndim >= 2 else 100
            value.copy_(noise / fan_in**0.5 + float(is_gain))
    return module.eval().requires_grad_(False)


def tokens(count: int = 2, length: int = 12, vocabulary: int = 64) -> dict[str, Tensor]:
    """`input_ids` int64 `[count, length]`."""
    random = torch.Generator().manual_seed(0)
    return {"input_ids": torch.randint(vocabulary, (count, length), generator=random)}


def features(*shape: int) -> dict[str, Tensor]:
    """`x` float32 of a shape, normally distributed."""
    return {"x": torch.randn(shape, generator=torch.Generator().manual_seed(0))}


def linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A frozen linear layer with these weights `[out, in]`."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, dtype=weight.dtype)
    with torch.no_grad():
        layer.weight.copy_(weight)
        if bias is not None:
            layer.bias.copy_(bias)
    return layer.requires_grad_(False)
