"""Functions of PyTorch that make tensors or change their shapes, on shapes alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from redpass.checks.shapes import Numbers, Tensor, if_known, sizes_of
from redpass.checks.stand_ins import Undecided


class _AnyTensor(type):
    def __instancecheck__(cls, value: object) -> bool:
        return isinstance(value, Tensor)

    def __call__(cls, *sizes: Any, **_: Any) -> Tensor:
        return tensor(sizes[0]) if sizes and isinstance(sizes[0], list) else sized(*sizes)


class AnyTensor(metaclass=_AnyTensor):
    """Stands in for `torch.Tensor`, which makes tensors of sizes or of lists."""


def sized(*sizes: Any, size: Any = None, **_: Any) -> Tensor:
    """Stands in for `torch.empty` and its like. Raises `Undecided` for a size of -1."""
    found = sizes_of(sizes if size is None else (size,))
    if min(found, default=0) < 0:
        raise Undecided("a negative size")
    return Tensor(found)


def full(size: Any, *_: Any, **__: Any) -> Tensor:
    """Stands in for `torch.full`."""
    return sized(size)


def like(value: Any, *_: Any, **__: Any) -> Tensor:
    """Stands in for a function of each element."""
    return Tensor(getattr(value, "_shape", None))


def same(value: Any, *_: Any, **__: Any) -> Any:
    """Stands in for what fills a tensor in place."""
    return value


def arange(*values: Any, **named: Any) -> Tensor:
    """Stands in for `torch.arange`."""
    plain = all(type(value) is int for value in values) and named.keys() <= {"dtype", "device"}
    return Tensor([len(range(*values))] if plain else None)


def linspace(start: Any, end: Any, steps: Any = None, **_: Any) -> Tensor:
    """Stands in for `torch.linspace`."""
    if any(type(value) not in (int, float) for value in (start, end, steps)):
        return Tensor()
    return Numbers([start + (end - start) * i / max(steps - 1, 1) for i in range(steps)])


def tensor(data: Any, **_: Any) -> Tensor:
    """Stands in for `torch.tensor` of numbers and lists of them."""
    shape = []
    while isinstance(data, list | tuple):
        shape.append(len(data))
        data = data[0] if data else 0
    return Tensor(shape if isinstance(data, int | float) else None)


@if_known
def pad(value: Any, pads: Sequence[int], *_: Any, **__: Any) -> Tensor:
    """Stands in for `torch.nn.functional.pad`."""
    sizes = list(value.shape)
    for axis, (before, after) in enumerate(zip(pads[::2], pads[1::2], strict=True), 1):
        sizes[-axis] += before + after
    return Tensor(sizes)


@if_known
def cat(tensors: Sequence[Any], dim: int = 0, **_: Any) -> Tensor:
    """Stands in for `torch.cat`."""
    shapes = [list(each.shape) for each in tensors]
    total = sum(shape[dim] for shape in shapes)
    for shape in shapes:
        shape[dim] = total
    if any(shape != shapes[0] for shape in shapes):
        raise Undecided("tensors that do not fit")
    return Tensor(shapes[0])


@if_known
def stack(tensors: Sequence[Any], dim: int = 0, **_: Any) -> Tensor:
    """Stands in for `torch.stack`."""
    return cat([each.unsqueeze(dim) for each in tensors], dim)


def chunk(value: Any, chunks: int, dim: int = 0) -> list[Tensor]:
    """Stands in for `torch.chunk` where the parts are of one size."""
    shape = list(value.shape)
    if shape[dim] % chunks:
        raise Undecided("parts of different sizes")
    shape[dim] //= chunks
    return [Tensor(shape) for _ in range(chunks)]
