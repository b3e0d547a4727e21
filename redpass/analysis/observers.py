"""What can be summed over tokens in one run: cosines, second moments, spreads, kernel alignments.

An observer is a frozen record of the values it looks at (names of nodes) and of what one stretch
of tokens adds to its sum, one float64 tensor. Sums over stretches, batches, processes and
restarts add up. `statistics.collect` runs them.

`rows[name]` is `[tokens, width]` in the program's own type, the same tokens for all values of one
observer; sums are formed in float64.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

STRETCH = 256
"""Tokens that are summed together. Also the sample size of `KernelAlignment`."""

PIECE = 1 << 22
"""Float64 numbers that are held at once while many values are compared: 32 MiB."""

Rows = Mapping[str, Tensor]
Widths = Mapping[str, int]


class Observer(Protocol):
    """What `collect` sums up; hashable, so that a sum is found under its observer."""

    @property
    def values(self) -> tuple[str, ...]:
        """The nodes whose values it needs together."""
        ...

    def shape(self, widths: Widths) -> tuple[int, ...]:
        """The shape of its sum for values of these widths."""
        ...

    def measure(self, rows: Rows) -> Tensor:
        """What up to `STRETCH` tokens add to the sum."""
        ...


@dataclass(frozen=True)
class CrossGram:
    """Second moments of two values (of one, where both names are equal), and their first ones.

    With a column of ones added to both, `[X 1]ᵀ [Y 1]`: shape `[left + 1, right + 1]`.
    `Statistics.moments` takes it apart.
    """

    left: str
    right: str

    @property
    def values(self) -> tuple[str, ...]:
        """The two values, or the one."""
        return tuple(dict.fromkeys((self.left, self.right)))

    def shape(self, widths: Widths) -> tuple[int, ...]:
        """`[left + 1, right + 1]`."""
        return widths[self.left] + 1, widths[self.right] + 1

    def measure(self, rows: Rows) -> Tensor:
        """The products of a stretch; a product of half precision would round its sums away."""
        x, y = (
            torch.nn.functional.pad(_single(rows[n]), (0, 1), value=1.0)
            for n in (self.left, self.right)
        )
        return x.T @ y


def _single(rows: Tensor) -> Tensor:
    return rows.float() if rows.dtype.itemsize < 4 else rows


@dataclass(frozen=True)
class BlockGram:
    """Second and first moments of a value in `blocks` equal parts, each with itself alone.

    As `CrossGram` of each part: shape `[blocks, size + 1, size + 1]`.
    """

    value: str
    blocks: int

    @property
    def values(self) -> tuple[str, ...]:
        """The one value."""
        return (self.value,)

    def shape(self, widths: Widths) -> tuple[int, ...]:
        """`[blocks, size + 1, size + 1]`."""
        size = widths[self.value] // self.blocks + 1
        return self.blocks, size, size

    def measure(self, rows: Rows) -> Tensor:
        """The products of a stretch."""
        parts = rows[self.value].unflatten(1, (self.blocks, -1)).transpose(0, 1).double()
        parts = torch.nn.functional.pad(parts, (0, 1), value=1.0)
        found: Tensor = parts.mT @ parts
        return found


@dataclass(frozen=True)
class NormedGram:
    """Second and first moments of what a norm without gain makes of a value.

    With `u = (x - mean(x)) / sqrt(var(x) + eps)`, or without the mean, `[U 1]ᵀ [U 1]`: shape
    `[width + 1, width + 1]`.
    """

    value: str
    is_centred: bool
    eps: float

    @property
    def values(self) -> tuple[str, ...]:
        """The one value."""
        return (self.value,)

    def shape(self, widths: Widths) -> tuple[int, ...]:
        """`[width + 1, width + 1]`."""
        size = widths[self.value] + 1
        return size, size

    def measure(self, rows: Rows) -> Tensor:
        """The products of a stretch."""
        x = rows[self.value].double()
        if self.is_centred:
            x = x - x.mean(-1, keepdim=True)
        unit = x * (x.square().mean(-1, keepdim=True) + self.eps).clamp_min(1e-300).rsqrt()
        unit = torch.nn.functional.pad(unit, (0, 1), value=1.0)
        found: Tensor = unit.T @ unit
        return found


@dataclass(frozen=True)
class Alignment:
    """Cosines and angles between all pairs of values of one width: shape `[2, n, n]`.

    `[0]` sums `cos(x_i, x_j)`, `[1]` sums `arccos(cos(x_i, x_j)) / π`, a distance from 0 to 1.
    A token at which either is zero counts as at right angles.
    """

    names: tuple[str, ...]

    @property
    def values(self) -> tuple[str, ...]:
        """All of them."""
        return self.names

    def shape(self, widths: Widths) -> tuple[int, ...]:
        """`[2, n, n]`."""
        del widths
        return 2, len(self.names), len(self.names)

    def measure(self, rows: Rows) -> Tensor:
        """The sums of a stretch."""
        values = [rows[name] for name in self.names]
        found = torch.zeros(2, len(values), len(values), dtype=torch.float64)
        step = max(1, PIECE // (len(values) * values[0].shape[-1]))
        for start in range(0, len(values[0]), step):
            piece = slice(start, start + step)
            units = torch.stack([_unit(value[piece].double()) for value in values], dim=1)
            cosines = (units @ units.transpose(1, 2)).clamp(-1.0, 1.0)
            found += torch.stack([cosines.sum(0), cosines.arccos().sum(0) / math.pi])
        return found


@dataclass(frozen=True)
class Turn:
    """How far a part turns the sum it is in: shape `[2]`.

    `[0]` sums `cos(total - part, total)`, `[1]` sums `|part| / |total|`.
    """

    total: str
    part: str

    @property
    def values(self) -> tuple[str, ...]:
        """The sum and the part."""
        return self.total, self.part

    def shape(self, widths: Widths) -> tuple[int, ...]:
        """`[2]`."""
        del widths
        return (2,)

    def measure(self, rows: Rows) -> Tensor:
        """The sums of a stretch."""
        total, part = rows[self.total].double(), rows[self.part].double()
        cosine = (_unit(total - part) * _unit(total)).sum(-1)
        ratio = part.norm(dim=-1) / total.norm(dim=-1).clamp_min(1e-30)
        return torch.stack([cosine.sum(), ratio.sum()])


@dataclass(frozen=True)
class Spread:
    """Sum and sum of squares of every feature of a value: shape `[2, width]`."""

    value: str

    @property
    def values(self) -> tuple[str, ...]:
        """The one value."""
        return (self.value,)

    def shape(self, widths: Widths) -> tuple[int, ...]:
        """`[2, width]`."""
        return 2, widths[self.value]

    def measure(self, rows: Rows) -> Tensor:
        """The sums of a stretch."""
        x = rows[self.value].double()
        return torch.stack([x.sum(0), x.square().sum(0)])


@dataclass(frozen=True)
class KernelAlignment:
    """Unbiased HSIC with linear kernels between all pairs of values: shape `[n, n]`.

    Each stretch of `m` tokens gives its estimate `m` times; stretches below four tokens have none
    and give nothing. Values may differ in width.

    Source: Song et al. 2012, equation 5; over minibatches: Nguyen et al. 2021, arXiv:2010.15327.
    """

    names: tuple[str, ...]

    @property
    def values(self) -> tuple[str, ...]:
        """All of them."""
        return self.names

    def shape(self, widths: Widths) -> tuple[int, ...]:
        """`[n, n]`."""
        del widths
        return len(self.names), len(self.names)

    def measure(self, rows: Rows) -> Tensor:
        """The estimate of a stretch, times its tokens."""
        kernels = torch.stack([_kernel(rows[name].double()) for name in self.names])
        count = kernels.shape[-1]
        if count < 4:
            return kernels.new_zeros(len(self.names), len(self.names))
        flat, sums = kernels.flatten(1), kernels.sum(-1)
        whole = sums.sum(-1)
        products: Tensor = flat @ flat.T
        products += torch.outer(whole, whole) / ((count - 1) * (count - 2))
        products -= 2 / (count - 2) * sums @ sums.T
        return products / (count - 3)


def _unit(rows: Tensor) -> Tensor:
    lengths: Tensor = rows.norm(dim=-1, keepdim=True)
    return rows / lengths.clamp_min(1e-150)


def _kernel(rows: Tensor) -> Tensor:
    """`X Xᵀ` without its diagonal. Centred first: that changes nothing but the rounding."""
    rows = rows - rows.mean(0)
    products: Tensor = rows @ rows.T
    products.fill_diagonal_(0.0)
    return products


def all_pairs(names: Sequence[str]) -> tuple[CrossGram, ...]:
    """Returns the cross-Gram observers of each value with itself and with every later one."""
    return tuple(CrossGram(a, b) for i, a in enumerate(names) for b in names[i:])
