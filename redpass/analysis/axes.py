"""Axes that go together: a union-find over the dimensions of values and weights."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(eq=False)
class Dimension:
    """A dimension of `size` units; `parent` or `parts` once it is known to be another one."""

    size: int
    parent: Dimension | None = None
    parts: tuple[Segment, ...] | None = None
    fixed: str = ""


@dataclass(frozen=True, eq=False)
class Segment:
    """A dimension as part of an axis: each unit takes `block` neighbouring indices."""

    dimension: Dimension
    block: int = 1

    @property
    def length(self) -> int:
        """How many indices it takes."""
        return self.dimension.size * self.block


Axis = tuple[Segment, ...]
"""What an axis is made of, in order; empty where its size is symbolic or one."""


def fresh(size: object) -> Axis:
    """An axis nothing is known about but its size."""
    return (Segment(Dimension(size)),) if isinstance(size, int) and size > 1 else ()


def root(dimension: Dimension) -> Dimension:
    """The dimension that stands for all that are equal to this one."""
    while dimension.parent is not None:
        if dimension.parent.parent is not None:
            dimension.parent = dimension.parent.parent
        dimension = dimension.parent
    return dimension


def resolve(axis: Iterable[Segment]) -> Axis:
    """The axis in terms of root dimensions that are not made of parts."""
    result: list[Segment] = []
    for segment in axis:
        found = root(segment.dimension)
        if found.parts is None:
            result.append(Segment(found, segment.block))
        else:
            inner = resolve(found.parts)
            result += [Segment(part.dimension, part.block * segment.block) for part in inner]
    return tuple(result)


def length(axis: Axis) -> int:
    """How many indices the axis has (1 where nothing is known)."""
    return sum(segment.length for segment in axis) if axis else 1


def unify(left: Axis, right: Axis) -> None:
    """Notes that two axes are the same; axes that do not fit each other become fixed."""
    if not left or not right:
        return
    left, right = resolve(left), resolve(right)
    if _shape(left) == _shape(right):
        for a, b in zip(left, right, strict=True):
            _merge(a.dimension, b.dimension)
    elif length(left) == length(right) and _is_plain(left):
        _bind(left[0].dimension, right)
    elif length(left) == length(right) and _is_plain(right):
        _bind(right[0].dimension, left)
    else:
        fix((left, right), "it meets a dimension that is divided in another way")


def fix(axes: Iterable[Axis], why: str) -> None:
    """Notes why dimensions cannot be cut."""
    for axis in axes:
        for segment in resolve(axis):
            segment.dimension.fixed = segment.dimension.fixed or why


def _shape(axis: Axis) -> list[tuple[int, int]]:
    return [(segment.dimension.size, segment.block) for segment in axis]


def _is_plain(axis: Axis) -> bool:
    return len(axis) == 1 and axis[0].block == 1


def _merge(left: Dimension, right: Dimension) -> None:
    left, right = root(left), root(right)
    if left is not right:
        right.parent = left
        left.fixed = left.fixed or right.fixed


def _bind(dimension: Dimension, parts: Axis) -> None:
    if any(part.dimension is dimension for part in parts):
        return
    dimension.parts = parts
    if dimension.fixed:
        fix((parts,), dimension.fixed)


def reshaped(axes: Sequence[Axis], before: Sequence[object], after: Sequence[object]) -> list[Axis]:
    """Axes of a value viewed in another shape.

    Axes keep what they are where the view keeps them; where neighbours are flattened into one,
    the first keeps its units with a larger block. What is split is fixed and starts anew.
    """
    same = 0
    while same < min(len(before), len(after)) and before[-1 - same] == after[-1 - same]:
        same += 1
    kept = list(axes[len(axes) - same :])
    before, after = before[: len(before) - same], after[: len(after) - same]
    axes = axes[: len(axes) - same]
    result: list[Axis] = []
    i = j = 0
    while j < len(after):
        if i < len(before) and before[i] == after[j]:
            result.append(axes[i])
            i, j = i + 1, j + 1
            continue
        if after[j] == 1:
            result.append(())
            j += 1
            continue
        k, m = _group(before, after, i, j)
        merged = _flattened(axes[i:k], before[i:k]) if m - j == 1 else None
        if merged is None:
            fix(axes[i:k], "a view splits it")
            result += [fresh(size) for size in after[j:m]]
        else:
            result.append(merged)
        i, j = k, m
    return result + kept


def _group(before: Sequence[object], after: Sequence[object], i: int, j: int) -> tuple[int, int]:
    """Ends (exclusive) of the smallest runs from `i` and `j` that hold as many elements."""
    k, m = i + 1, j + 1
    left: object = before[i] if i < len(before) else 1
    right: object = after[j]
    for _ in range(len(before) + len(after)):
        if left == right or not (isinstance(left, int) and isinstance(right, int)):
            break
        if left < right and k < len(before):
            size = before[k]
            left, k = (left * size if isinstance(size, int) else size), k + 1
        elif right < left and m < len(after):
            size = after[m]
            right, m = (right * size if isinstance(size, int) else size), m + 1
        else:
            break
    if left == right and isinstance(left, int):
        return k, m
    return len(before), len(after)


def _flattened(axes: Sequence[Axis], sizes: Sequence[object]) -> Axis | None:
    if not axes or not all(isinstance(size, int) for size in sizes) or not axes[0]:
        return None
    inner = 1
    for size in sizes[1:]:
        assert isinstance(size, int)
        inner *= size
    return tuple(Segment(s.dimension, s.block * inner) for s in axes[0])
