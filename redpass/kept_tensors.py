"""Tensors beside the journal of a run: dtype, shape and bytes, or not there."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor

from redpass.blocks import JSON, Blocks


def keep(blocks: Blocks, name: str, tensor: Tensor, about: JSON = None) -> None:
    """Keeps a tensor of any dtype and what the caller says about it, if there is a file."""
    if blocks.path is None:
        return
    flat: Any = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    form = [str(tensor.dtype).removeprefix("torch."), list(tensor.shape), about]
    blocks.keep(name, form, memoryview(flat))


def find(blocks: Blocks, name: str) -> tuple[Tensor, JSON] | None:
    """Returns the tensor called `name` and what was said about it; None when it is not kept."""
    found = blocks.find(name)
    if found is None:
        return None
    with contextlib.suppress(AttributeError, TypeError, ValueError, RuntimeError):
        (dtype, shape, about), data = found
        return torch.frombuffer(data, dtype=getattr(torch, dtype)).reshape(shape), about
    return None
