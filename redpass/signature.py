"""What callers of a program see: its inputs and outputs, their dtypes and symbolic shapes."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from redpass.errors import UsageError

Shape = tuple[int | str, ...]
"""Sizes; a symbolic one is an expression over dimension names, such as `past + seq`."""


@dataclass(frozen=True)
class Port:
    """One public input or output: its name, dtype and symbolic shape."""

    name: str
    dtype: torch.dtype
    shape: Shape

    def __str__(self) -> str:
        dims = ",".join(map(str, self.shape))
        return f"{self.name}:{str(self.dtype).removeprefix('torch.')}[{dims}]"


@dataclass(frozen=True)
class Signature:
    """What callers see: ports in order, state pairs, and the range of each named dimension.

    Attributes:
        state: (input, output) names whose output feeds the input of the next call: a KV cache.
        dims: dimension name -> (smallest, largest or None).
    """

    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    state: tuple[tuple[str, str], ...] = ()
    dims: Mapping[str, tuple[int, int | None]] = field(default_factory=dict)

    def input(self, name: str) -> Port:
        """Returns the input port called `name`. Raises KeyError."""
        return {port.name: port for port in self.inputs}[name]

    def output(self, name: str) -> Port:
        """Returns the output port called `name`. Raises KeyError."""
        return {port.name: port for port in self.outputs}[name]

    def resized(self, names: Collection[str], axis: int, size: int) -> Signature:
        """Returns the signature with another constant size on one axis of the named ports."""

        def of(port: Port) -> Port:
            shape = tuple(size if place == axis else old for place, old in enumerate(port.shape))
            return replace(port, shape=shape) if port.name in names else port

        inputs, outputs = tuple(map(of, self.inputs)), tuple(map(of, self.outputs))
        return replace(self, inputs=inputs, outputs=outputs)


def check_port(port: Port, value: Tensor) -> None:
    """Raises `UsageError` when `value` has not the dtype, rank and fixed sizes of `port`."""
    sizes = tuple(value.shape)
    fits = len(sizes) == len(port.shape) and all(
        isinstance(want, str) or want == size for want, size in zip(port.shape, sizes, strict=True)
    )
    if value.dtype != port.dtype or not fits:
        found = f"found {str(value.dtype).removeprefix('torch.')}{list(sizes)}"
        raise UsageError(f"{found}, expected {port}", place=f"input '{port.name}'")
