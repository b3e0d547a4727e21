"""Input specs: `input_ids:int64[batch,seq]`, the user's words for what a model takes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from redpass.errors import UsageError, nearest

FORM = "write 'name:dtype[sizes]', such as 'input_ids:int64[batch,seq]' or 'x:float32[batch,16]'"
DTYPES = (
    "float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool",
)  # fmt: skip
"""PyTorch's names of what an input can be made of."""

_SPEC = re.compile(r"(?P<name>[A-Za-z_][\w.]*):(?P<dtype>\w+)\[(?P<axes>[^\[\]]*)\]")
_AXIS = re.compile(r"\d+|[A-Za-z_]\w*(\s*[+*]\s*([A-Za-z_]\w*|\d+))*")


@dataclass(frozen=True)
class InputSpec:
    """One input as the user describes it; `axes` are sizes or expressions over names."""

    name: str
    dtype: str
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
    return InputSpec(name, dtype, tuple(int(a) if a.isdigit() else a for a in axes))


def parse_all(texts: Sequence[str]) -> list[InputSpec]:
    """Reads specs of different inputs. Raises `UsageError` for a name given twice."""
    specs = [parse(text) for text in texts]
    names = [spec.name for spec in specs]
    for name in names:
        if names.count(name) > 1:
            raise UsageError(f"input '{name}' is described twice", place="--input")
    return specs
