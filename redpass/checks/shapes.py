"""Tensors of which only the shape is known, for model classes built without PyTorch."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from redpass.checks.stand_ins import Undecided, Unknown, is_code


class Value(Unknown):
    """Something PyTorch gives: no module and no parameter."""

    def _result(self, values: tuple[Any, ...]) -> Any:
        return values[0] if len(values) == 1 and is_code(values[0]) else Tensor()


class Size(tuple[int, ...]):
    """Stands in for `torch.Size`."""

    def numel(self) -> int:
        """Returns the product."""
        return math.prod(self)


class Type:
    """Stands in for `torch.dtype`."""

    is_floating_point = True


def if_known(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Makes a function give a tensor of unknown shape where it cannot tell the shape."""

    @functools.wraps(function)
    def given(*values: Any, **named: Any) -> Tensor:
        try:
            return function(*values, **named)
        except Undecided:
            return Tensor()

    return given


@dataclass(frozen=True)
class Device:
    """Stands in for `torch.device`."""

    type: str
    index: int | None = None

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        pass


FLOAT = Type()
_SAME = re.compile(
    "to|float|half|bool|int|long|double|bfloat16|clone|detach|contiguous|cpu|type|requires_grad_|"
    "normal_|uniform_|zero_|fill_|mul_|add_|sub_|div_|clamp_?|copy_|exp_?|log_?|sqrt|abs|sin|cos|"
    "tanh|sigmoid|pow|neg|type_as|round|floor|ceil|erf|rsqrt|masked_fill_?|trunc_?|sign|flip|roll"
)


class Tensor(Value):
    """A tensor of which the shape is known, or not even that."""

    dtype, grad, grad_fn, is_meta, is_cuda = FLOAT, None, None, False, False
    device = Device("cpu")

    def __init__(self, shape: Sequence[int] | None = None) -> None:
        self.__dict__.update(_path="a tensor", _shape=None if shape is None else Size(shape))

    def __getattr__(self, name: str) -> Any:
        if name == "data":
            return self
        if name.startswith("_"):
            raise AttributeError(name)
        if _SAME.fullmatch(name):
            return lambda *_, **__: Tensor(self._shape)
        if name.endswith("_"):  # it may give this very tensor another shape
            raise Undecided(f"{name} of a tensor")
        return Value(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "data":
            self.__dict__["_shape"] = getattr(value, "_shape", None)
        else:
            self.__dict__[name] = value

    def _result(self, values: tuple[Any, ...]) -> Any:
        if len(values) == 1 and is_code(values[0]):  # `torch.no_grad()` as a decorator
            return values[0]
        raise Undecided("a tensor is called")

    def _derived(self, *others: Any) -> Any:
        shapes = [getattr(other, "_shape", ()) for other in others]
        if None in (*shapes, self._shape) or not all(map(_is_operand, others)):
            return Tensor()
        return Tensor(_broadcast([self._shape, *shapes]))

    def __getitem__(self, key: Any) -> Any:
        if key is Ellipsis:
            return Tensor(self._shape)
        keys = key if isinstance(key, tuple) else (key,)
        if self._shape is None or not all(part is None or type(part) is slice for part in keys):
            return Tensor()
        return Tensor(_sliced(self._shape, keys))

    def __len__(self) -> int:  # type: ignore[override]
        return self.shape[0]

    @property
    def shape(self) -> Size:
        """The shape. Raises `Undecided` when it is not known."""
        if self._shape is None:
            raise Undecided("the shape of a tensor")
        return Size(self._shape)

    @property
    def ndim(self) -> int:
        """How many axes there are."""
        return len(self.shape)

    def dim(self) -> int:
        """Returns how many axes there are."""
        return len(self.shape)

    def size(self, axis: int | None = None) -> Any:
        """Returns the shape, or one size of it."""
        return self.shape if axis is None else self.shape[axis]

    def numel(self) -> int:
        """Returns how many elements there are."""
        return math.prod(self.shape)

    def is_contiguous(self, **_: object) -> bool:
        """Returns what is true of a new tensor."""
        return True

    def is_floating_point(self) -> bool:
        """Returns what is true of a weight; it does not change its shape."""
        return True

    def item(self) -> NoReturn:
        """Raises `Undecided`: there are no numbers."""
        raise Undecided("a number of a tensor")

    def tolist(self) -> Any:
        """Raises `Undecided`: there are no numbers."""
        raise Undecided("numbers of a tensor")

    @if_known
    def unsqueeze(self, axis: int) -> Tensor:
        """Returns the shape with a new axis."""
        sizes = list(self.shape)
        sizes.insert(axis + len(sizes) + 1 if axis < 0 else axis, 1)
        return Tensor(sizes)

    @if_known
    def expand(self, *sizes: Any) -> Tensor:
        """Returns the shape that is asked for; -1 keeps a size."""
        wanted = sizes_of(sizes)
        old = [1] * (len(wanted) - self.ndim) + list(self.shape)
        return Tensor([a if b == -1 else b for a, b in zip(old, wanted, strict=True)])

    @if_known
    def repeat(self, *sizes: Any) -> Tensor:
        """Returns the shape, each size so many times."""
        times = sizes_of(sizes)
        old = [1] * (len(times) - self.ndim) + list(self.shape)
        return Tensor([a * b for a, b in zip(old, times, strict=True)])

    @if_known
    def reshape(self, *sizes: Any) -> Tensor:
        """Returns the shape that is asked for; -1 is what is left."""
        wanted = sizes_of(sizes)
        rest = math.prod(size for size in wanted if size != -1)
        sizes = tuple(self.numel() // rest if size == -1 and rest else size for size in wanted)
        if math.prod(sizes) != self.numel():
            raise Undecided("a shape that does not fit")
        return Tensor(sizes)

    view = reshape

    @if_known
    def transpose(self, first: int, second: int) -> Tensor:
        """Returns the shape with two axes exchanged."""
        sizes = list(self.shape)
        sizes[first], sizes[second] = sizes[second], sizes[first]
        return Tensor(sizes)


class Numbers(Tensor):
    """A row of numbers that are known."""

    def __init__(self, numbers: Sequence[float]) -> None:
        super().__init__([len(numbers)])
        self.__dict__["_numbers"] = numbers

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        return iter([Number(number) for number in self._numbers])

    def tolist(self) -> list[float]:
        """Returns them."""
        return list(self._numbers)

    def split(self, sizes: Sequence[int]) -> list[Numbers]:
        """Returns rows of these lengths."""
        ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
        pairs = zip(sizes, ends, strict=True)
        return [Numbers(self._numbers[end - size : end]) for size, end in pairs]


class Number(float):
    """A number in a tensor."""

    def item(self) -> float:
        """Returns it."""
        return float(self)


class Parameter(Tensor):
    """A weight: its shape must be known."""

    def __init__(self, data: Any = None, requires_grad: bool = True) -> None:
        super().__init__((0,) if data is None else data.shape)
        self.__dict__.update(_path="a parameter", requires_grad=requires_grad)


class Buffer(Tensor):
    """Stands in for `torch.nn.Buffer`."""

    _is_buffer = True

    def __init__(self, data: Any = None, *, persistent: bool = True) -> None:
        super().__init__((0,) if data is None else data._shape)
        self.__dict__.update(_path="a buffer", persistent=persistent)


def _is_operand(value: object) -> bool:
    return isinstance(value, int | float | Tensor)


def _broadcast(shapes: Sequence[Sequence[int]]) -> list[int]:
    axes = max(map(len, shapes))
    columns = zip(*([1] * (axes - len(shape)) + list(shape) for shape in shapes), strict=True)
    found = [{size for size in column if size != 1} or {1} for column in columns]
    if any(len(sizes) > 1 for sizes in found):
        raise Undecided("shapes that do not fit")
    return [sizes.pop() for sizes in found]


def _sliced(shape: Sequence[int], keys: Sequence[slice | None]) -> list[int]:
    left = list(shape)
    found = [1 if key is None else len(range(left.pop(0))[key]) for key in keys]
    return [*found, *left]


def sizes_of(sizes: Sequence[Any]) -> list[int]:
    """Returns sizes given one by one or as a list. Raises `Undecided` for one not known."""
    first = sizes[0] if len(sizes) == 1 and isinstance(sizes[0], tuple | list) else sizes
    if any(type(size) is not int for size in first):
        raise Undecided("a size")
    return list(first)
