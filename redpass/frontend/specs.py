"""Example inputs made from specs."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor

from redpass.checks.input_specs import InputSpec
from redpass.frontend.dims import evaluate


def example(specs: Sequence[InputSpec]) -> dict[str, Tensor]:
    """Returns example tensors: normal floats, zeros for integers, ones for masks.

    Every dimension name gets a size of its own, so that none is taken for another.
    """
    words = [w for s in specs for a in s.axes if isinstance(a, str) for w in re.findall(_WORD, a)]
    names = list(dict.fromkeys(words))
    taken = {axis for spec in specs for axis in spec.axes if isinstance(axis, int)}
    free = (size for size in range(2, 10_000) if size not in taken)
    sizes = {name: next(free) for name in names}
    generator = torch.Generator().manual_seed(0)
    return {spec.name: _tensor(spec, sizes, generator) for spec in specs}


_WORD = r"[A-Za-z_]\w*"


def _tensor(spec: InputSpec, sizes: dict[str, int], generator: torch.Generator) -> Tensor:
    shape = [int(evaluate(axis, sizes)) for axis in spec.axes]
    dtype: torch.dtype = getattr(torch, spec.dtype)
    if dtype.is_floating_point:
        return torch.randn(shape, generator=generator).to(dtype)
    is_mask = dtype == torch.bool or spec.name.endswith("mask")
    return (torch.ones if is_mask else torch.zeros)(shape, dtype=dtype)
