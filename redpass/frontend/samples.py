"""Random inputs that a program accepts, for any sizes of its dimensions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, fx

from redpass import ops
from redpass.frontend.dims import evaluate
from redpass.program import Port, Program

SIZES = {"batch": 2, "seq": 5, "past": 3}
"""Sizes of dimensions when none are asked for; any other is 4."""


def random_inputs(
    program: Program, sizes: Mapping[str, int] | None = None, *, seed: int = 0
) -> dict[str, Tensor]:
    """Returns one batch of inputs by name.

    Integer inputs that are looked up in a table stay below its rows; masks are ones; positions
    count up from the past length; floats are normal; other integers are 0 or 1.

    Args:
        sizes: dimension name -> size; the rest as in `SIZES`, kept within the signature's ranges.
        seed: seeds a generator of its own; the global one is left alone.
    """
    generator = torch.Generator().manual_seed(seed)
    known = {
        name: _within(SIZES.get(name, 4), bounds) for name, bounds in program.signature.dims.items()
    }
    known |= dict(sizes or {})
    nodes = zip(program.signature.inputs, program.inputs, strict=True)
    return {port.name: _sample(port, node, program, known, generator) for port, node in nodes}


def table_rows(program: Program, node: fx.Node) -> int | None:
    """Returns the rows of the smallest table that an input indexes, or None."""
    rows = []
    for user in _readers(node):
        if ops.is_call(user, "embedding") and isinstance(user.args[0], fx.Node):
            rows.append(int(user.args[0].meta["val"].shape[0]))
    return min(rows) if rows else None


def _readers(node: fx.Node) -> Iterator[fx.Node]:
    """Yields the readers of an input, looking through views and casts."""
    for user in node.users:
        if ops.is_view(user) or ops.is_call(user, "to", "_to_copy", "clone", "contiguous"):
            yield from _readers(user)
        else:
            yield user


def _within(size: int, bounds: tuple[int, int | None]) -> int:
    low, high = bounds
    return max(low, size if high is None else min(size, high))


def _sample(
    port: Port,
    node: fx.Node,
    program: Program,
    sizes: Mapping[str, int],
    generator: torch.Generator,
) -> Tensor:
    shape = [int(evaluate(size, sizes)) for size in port.shape]
    if port.dtype.is_floating_point or port.dtype.is_complex:
        return torch.randn(shape, generator=generator, dtype=torch.float32).to(port.dtype)
    if port.name.endswith("mask") or port.dtype == torch.bool:
        return torch.ones(shape, dtype=port.dtype)
    rows = table_rows(program, node)
    if port.name.endswith("position_ids"):
        start = sizes.get("past", 0)
        positions = torch.arange(start, start + shape[-1]) % (rows or 2**31)
        return positions.expand(shape).to(port.dtype).contiguous()
    return torch.randint(rows or 2, shape, generator=generator).to(port.dtype)
