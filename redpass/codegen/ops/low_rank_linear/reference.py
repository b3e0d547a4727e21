"""A linear layer of low rank in plain PyTorch."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import linear

from redpass.codegen.ops.activation import ACTIVATIONS


def low_rank_linear(
    x: Tensor, down: Tensor, up: Tensor, bias: Tensor | None, activation: str
) -> Tensor:
    """Returns `activation((x down^T) up^T + bias)`.

    Args:
        x: [..., k].
        down: [r, k].
        up: [n, r].
        bias: [n].
        activation: a name in `ACTIVATIONS`.
    """
    return ACTIVATIONS[activation](linear(linear(x, down), up, bias))
