"""The gated half of a feed-forward layer in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from redpass.codegen.ops.activation import ACTIVATIONS


def gated_feed_forward(
    x: Tensor,
    gate: Tensor,
    up: Tensor,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    activation: str,
) -> Tensor:
    """Returns `activation(x gate^T) * (x up^T)` (Shazeer 2020, arXiv:2002.05202).

    Args:
        x: [..., k].
        gate: [n, k].
        up: [n, k].
        gate_bias: [n], added before the activation.
        up_bias: [n].
        activation: a name in `ACTIVATIONS`.
    """
    gated = ACTIVATIONS[activation](torch.nn.functional.linear(x, gate, gate_bias))
    return gated * torch.nn.functional.linear(x, up, up_bias)
