"""Input specs: `input_ids:int64[batch,seq]`, the user's words for what a model takes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from redpass.errors import UsageError, nearest
from redpass.frontend.dims import evaluate

FORM = "write 'name:dtype[sizes]', such as 'input_ids:int64[batch,seq]' or 'x:float32[batch,16]'"

_SPEC = re.compile(r"(?P<name>[A-Za-z_][\w.]*):(?P<dtype>\w+)\[(?P<axes>[^\[\]]*)\]")
_AXIS = re.compile(r"\d+|[A-Za-z_]\w*(\s*[+*]\s*([A-Za-z_]\w*|\d+))*")

DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32,
        torch.int16, torch.int8, torch.uint8, torch.bool,
    )
}  # fmt: skip


@dataclass(frozen=True)
class InputSpec:
    """One input as the user describes it; `axes` are sizes or expressions over names."""

    name: str
    dtype: torch.dtype
    axes: tuple[str | int, ...]


def parse(text: str) -> InputSpec:
    """Reads one spec. Raises `UsageError` that shows the form."""
    found = _SPEC.fullmatch(text.strip())
    if not found:
        raise UsageError(f"'{text}' is no input spec", place="--input", hint=FORM)
    name, dtype = found["name"], found["dtype"]
    if dtype not in DTYPES:
        hint = nearest(dtype, DTYPES)
        raise UsageError(f"unknown dtype '{dtype}' of '{name}'", place="--input", hint=hint)
    axes = [axis.strip() for axis in found["axes"].split(",")] if found["axes"].strip() else []
    for axis in axes:
        if not _AXIS.fullmatch(axis):
            raise UsageError(f"'{axis}' of '{name}' is no size", place="--input", hint=FORM)
    return InputSpec(name, DTYPES[dtype], tuple(int(a) if a.isdigit() else a for a in axes))


def parse_all(texts: Sequence[str]) -> list[InputSpec]:
    """Reads specs of different inputs. Raises `UsageError` for a name given twice."""
    specs = [parse(text) for text in texts]
    names = [spec.name for spec in specs]
    for name in names:
        if names.count(name) > 1:
            raise UsageError(f"input '{name}' is described twice", place="--input")
    return specs


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
    if spec.dtype.is_floating_point:
        return torch.randn(shape, generator=generator).to(spec.dtype)
    is_mask = spec.dtype == torch.bool or spec.name.endswith("mask")
    return (torch.ones if is_mask else torch.zeros)(shape, dtype=spec.dtype)
