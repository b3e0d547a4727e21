"""ONNX forms of operations that move elements, or make tensors from sizes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from typing import Any

import onnx_ir as ir
from torch import fx

from redpass import ops
from redpass.export.emitter import Emitter
from redpass.export.parts import part
from redpass.export.pointwise import operand
from redpass.export.sizes import Size, UntranslatedError, axis_of, shape_of, size_of, type_of

END = 2**31
"""At and above this an end of a slice means the end of the axis."""


def reshape(e: Emitter, node: fx.Node) -> ir.Value:
    """All views that keep the order of elements."""
    return e.reshape(e.value(node.args[0]), shape_of(node))


def permute(e: Emitter, node: fx.Node) -> ir.Value:
    """All views that permute axes."""
    rank = len(shape_of(node))
    order = list(range(rank))
    name = ops.base_name(node)
    if name in ("permute",):
        order = [int(axis) % rank for axis in ops.argument(node, "dims")]
    elif name in ("t", "numpy_T", "adjoint", "mT"):
        order = order[::-1] if name in ("t", "numpy_T") else [*order[:-2], rank - 1, rank - 2]
    else:
        pair: Any = node.args[1:3]
        first, second = (int(axis) % rank for axis in pair)
        order[first], order[second] = order[second], order[first]
    return e.transpose(e.value(node.args[0]), order)


def expand(e: Emitter, node: fx.Node) -> ir.Value:
    """Broadcasts."""
    return e.expand(e.value(node.args[0]), shape_of(node))


def cut(e: Emitter, node: fx.Node) -> ir.Value:
    """`slice` and `narrow`."""
    shape, axis = shape_of(node.args[0]), axis_of(node)
    if shape == shape_of(node):
        return e.value(node.args[0])
    if ops.base_name(node) == "narrow":
        start = size_of(ops.argument(node, "start"))
        return e.slice(e.value(node.args[0]), axis, start, start + shape_of(node)[axis])
    start, end, step = (size_of(ops.argument(node, name)) for name in ("start", "end", "step"))
    start, end = start or 0, END if end is None else end
    if isinstance(end, int) and end >= END:
        end = shape[axis] if isinstance(shape[axis], int) else END
    if axis == len(shape) - 1 and step == 1 and (found := part(e, node.args[0], start, end)):
        return found
    return e.slice(e.value(node.args[0]), axis, start, end, int(step))


def select(e: Emitter, node: fx.Node) -> ir.Value:
    """One index of one axis."""
    index = e.scalar(ops.argument(node, "index"), ir.DataType.INT64)
    return e.call("Gather", e.value(node.args[0]), index, axis=axis_of(node))


def concatenate(e: Emitter, node: fx.Node) -> ir.Value:
    """`cat`."""
    parts = [operand(e, item, type_of(node)) for item in ops.argument(node, "tensors")]
    if len(parts) == 1:
        return parts[0]
    return e.call("Concat", *parts, axis=axis_of(node))


def stack(e: Emitter, node: fx.Node) -> ir.Value:
    """`stack`."""
    axis = int(ops.argument(node, "dim")) % len(shape_of(node))
    parts = [operand(e, item, type_of(node)) for item in ops.argument(node, "tensors")]
    shape = shape_of(node)
    thin = (*shape[:axis], 1, *shape[axis + 1 :])
    return e.call("Concat", *(e.reshape(part, thin) for part in parts), axis=axis)


def divide_up(e: Emitter, node: fx.Node) -> tuple[ir.Value, ...]:
    """`split`, `split_with_sizes` and `chunk`."""
    axis = axis_of(node)
    widths = [size_of(value.shape[axis]) for value in node.meta["val"]]
    if apart := _apart(e, node, axis, widths):
        return apart
    parts = e.calls("Split", len(widths), e.value(node.args[0]), e.sizes(widths), axis=axis)
    return tuple(parts)


def _apart(e: Emitter, node: fx.Node, axis: int, widths: list[Size]) -> tuple[ir.Value, ...]:
    if axis != len(shape_of(node.args[0])) - 1 or not all(isinstance(w, int) for w in widths):
        return ()
    ends = list(accumulate(widths, initial=0))
    found = [part(e, node.args[0], start, end) for start, end in pairwise(ends)]
    return tuple(value for value in found if value is not None)


def unbind(e: Emitter, node: fx.Node) -> tuple[ir.Value, ...]:
    """Every index of one axis."""
    axis, value = axis_of(node), e.value(node.args[0])
    return tuple(
        e.call("Gather", value, e.constant(index), axis=axis)
        for index in range(len(node.meta["val"]))
    )


def item(e: Emitter, node: fx.Node) -> Any:
    """One result of a node with many."""
    source, place = node.args[:2]
    found = e.values[source] if isinstance(source, fx.Node) else None
    if not isinstance(found, Sequence) or not isinstance(place, int):
        raise UntranslatedError(f"'{node.name}' takes a part of one tensor")
    return found[place]


def repeat(e: Emitter, node: fx.Node) -> ir.Value:
    """`repeat`: tiles."""
    repeats = [size_of(size) for size in ops.argument(node, "repeats")]
    shape = shape_of(node.args[0])
    padded = (1,) * (len(repeats) - len(shape)) + shape
    value = e.reshape(e.value(node.args[0]), padded)
    return e.call("Tile", value, e.sizes(repeats))


def repeat_each(e: Emitter, node: fx.Node) -> ir.Value:
    """`repeat_interleave` by one number along one axis."""
    times, axis = ops.argument(node, "repeats"), ops.argument(node, "dim")
    if not isinstance(times, int) or axis is None:
        raise UntranslatedError("repeat_interleave by a tensor")
    shape, axis = shape_of(node.args[0]), axis_of(node)
    thin = (*shape[: axis + 1], 1, *shape[axis + 1 :])
    wide = (*shape[: axis + 1], times, *shape[axis + 1 :])
    return e.reshape(e.expand(e.reshape(e.value(node.args[0]), thin), wide), shape_of(node))


def roll(e: Emitter, node: fx.Node) -> ir.Value:
    """Moves elements around the end of axes."""
    value = e.value(node.args[0])
    shifts, dims = ops.argument(node, "shifts"), ops.argument(node, "dims")
    for shift, dim in zip(shifts, dims, strict=True):
        size = shape_of(node)[dim]
        cut = -shift % size if isinstance(size, int) else -shift
        parts = e.slice(value, dim, cut, END), e.slice(value, dim, 0, cut)
        value = e.call("Concat", *parts, axis=dim)
    return value


def flip(e: Emitter, node: fx.Node) -> ir.Value:
    """Reverses axes."""
    value = e.value(node.args[0])
    for dim in ops.argument(node, "dims"):
        value = e.slice(value, int(dim) % len(shape_of(node)), -1, -END, -1)
    return value


def pad(e: Emitter, node: fx.Node) -> ir.Value:
    """Pads with a constant."""
    widths = [size_of(size) for size in ops.argument(node, "pad")]
    if ops.base_name(node) == "pad" and ops.argument(node, "mode") != "constant":
        raise UntranslatedError("padding that is not constant")
    fill = ops.argument(node, "value")
    rank = len(shape_of(node))
    before: list[Size] = [0] * rank
    after: list[Size] = [0] * rank
    for number in range(len(widths) // 2):
        before[rank - 1 - number], after[rank - 1 - number] = widths[2 * number : 2 * number + 2]
    value = e.scalar(0 if fill is None else fill, type_of(node))
    return e.call("Pad", e.value(node.args[0]), e.sizes([*before, *after]), value)


def arange(e: Emitter, node: fx.Node) -> ir.Value:
    """Counts."""
    target: Any = node.target
    names = [argument.name for argument in target._schema.arguments]
    start = size_of(ops.argument(node, "start")) if "start" in names else 0
    step = size_of(ops.argument(node, "step")) if "step" in names else 1
    end = size_of(ops.argument(node, "end"))
    ends = [e.scalar(item, type_of(node)) for item in (start, end, step)]
    return e.call("Range", *ends)


def filled(value: float | None) -> Callable[[Emitter, fx.Node], ir.Value]:
    """Translates ops that make a tensor of one number; None reads the number off the node."""

    def translate(e: Emitter, node: fx.Node) -> ir.Value:
        number = ops.argument(node, "fill_value") if value is None else value
        one = e.scalar(number, type_of(node))
        shape = shape_of(node)
        return e.call("Expand", one, e.sizes(shape)) if shape else one

    return translate


def triangle(upper: int) -> Callable[[Emitter, fx.Node], ir.Value]:
    """Translates `tril` and `triu`."""

    def translate(e: Emitter, node: fx.Node) -> ir.Value:
        diagonal = e.scalar(ops.argument(node, "diagonal"), ir.DataType.INT64)
        return e.call("Trilu", e.value(node.args[0]), diagonal, upper=upper)

    return translate


TABLE: dict[str, Callable[[Emitter, fx.Node], Any]] = (
    dict.fromkeys(("view", "reshape", "_unsafe_view", "flatten", "unflatten", "squeeze",
                   "unsqueeze", "view_as"), reshape)
    | dict.fromkeys(("transpose", "permute", "t", "numpy_T", "mT", "swapaxes"), permute)
    | dict.fromkeys(("expand", "expand_as", "broadcast_to"), expand)
    | dict.fromkeys(("slice", "narrow"), cut)
    | dict.fromkeys(("split", "split_with_sizes", "chunk"), divide_up)
    | dict.fromkeys(("zeros", "new_zeros", "zeros_like", "empty_like", "empty"), filled(0))
    | dict.fromkeys(("ones", "new_ones", "ones_like"), filled(1))
    | dict.fromkeys(("full", "new_full", "full_like"), filled(None))
    | dict.fromkeys(("pad", "constant_pad_nd"), pad)
    | {
        "select": select, "cat": concatenate, "concat": concatenate, "stack": stack,
        "unbind": unbind, "getitem": item, "repeat": repeat, "repeat_interleave": repeat_each,
        "roll": roll, "flip": flip, "arange": arange, "tril": triangle(0),
        "triu": triangle(1),
    }
)  # fmt: skip
"""ATen base name -> translation."""
