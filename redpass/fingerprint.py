"""Telling programs apart by graph and weights, cheaply: what a journal's entries are named by."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from redpass.program import Program

SAMPLE = 4096
"""Numbers of a weight that are hashed as they are, spread evenly; all count in its sums."""

_known: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def fingerprint(program: Program) -> str:
    """Returns 16 hex digits of the graph, the signature and the weights.

    Two programs of one run with the same graph and other weights (a projection fitted anew, a
    width that keeps other channels) have different ones. No digest for security: see `_mark`.
    """
    parts = [program.digest]
    parts += [f"{name} {_mark(tensor)}" for name, tensor in sorted(program.weights.items())]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _mark(tensor: Tensor) -> str:
    """Form, two sums over all numbers and the bits of some; kept for as long as the tensor is."""
    if tensor not in _known:
        _known[tensor] = _compute(tensor)
    return str(_known[tensor])


def _compute(tensor: Tensor) -> str:
    form = f"{tensor.dtype} {list(tensor.shape)}"
    if tensor.is_meta or not tensor.numel():
        return form
    flat = tensor.detach().reshape(-1)
    spread = flat[:: -(-len(flat) // SAMPLE)].contiguous()
    bits = hashlib.sha256(spread.view(torch.uint8).numpy().tobytes()).hexdigest()
    if tensor.dtype.is_complex:
        flat = torch.view_as_real(flat).reshape(-1)
    if tensor.dtype.is_floating_point or tensor.dtype.is_complex:
        flat = flat.nan_to_num()
    sums = [float(flat.sum(dtype=torch.float64)), float(flat[::2].sum(dtype=torch.float64))]
    return f"{form} {sums} {bits}"
