"""ONNX forms of operations that move elements, pick them, or make tensors from sizes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import onnx_ir as ir
from torch import fx

from redpass import ops
from redpass.export.emitter import Emitter
from redpass.export.pointwise import operand
from redpass.export.sizes import Shape, Size, UntranslatedError, axis_of, shape_of, size_of, type_of

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
    return e.slice(e.value(node.args[0]), axis, start, end, int(step))


def select(e: Emitter, node: fx.Node) -> ir.Value:
    """One index of one axis."""
    index = e.scalar(ops.argument(node, "index"), ir.DataType.INT64)
    return e.call("Gather", e.value(node.args[0]), index, axis=axis_of(node))


def concatenate(e: Emitter, node: fx.Node) -> ir.Value:
    """`cat`."""
    parts = [operand(e, part, type_of(node)) for part in ops.argument(node, "tensors")]
    if len(parts) == 1:
        return parts[0]
    return e.call("Concat", *parts, axis=axis_of(node))


def stack(e: Emitter, node: fx.Node) -> ir.Value:
    """`stack`."""
    axis = int(ops.argument(node, "dim")) % len(shape_of(node))
    parts = [operand(e, part, type_of(node)) for part in ops.argument(node, "tensors")]
    shape = shape_of(node)
    thin = (*shape[:axis], 1, *shape[axis + 1 :])
    return e.call("Concat", *(e.reshape(part, thin) for part in parts), axis=axis)


def divide_up(e: Emitter, node: fx.Node) -> tuple[ir.Value, ...]:
    """`split`, `split_with_sizes` and `chunk`."""
    axis = axis_of(node)
    widths = [size_of(part.shape[axis]) for part in node.meta["val"]]
    parts = e.calls("Split", len(widths), e.value(node.args[0]), e.sizes(widths), axis=axis)
    return tuple(parts)


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


def embedding(e: Emitter, node: fx.Node) -> ir.Value:
    """Rows of a table."""
    return e.call("Gather", e.value(node.args[0]), e.value(node.args[1]), axis=0)


def gather(e: Emitter, node: fx.Node) -> ir.Value:
    """Elements along one axis; torch's index may be smaller than its source elsewhere."""
    source, index = node.args[0], ops.argument(node, "index")
    value, axis = e.value(source), axis_of(node)
    for other, (have, want) in enumerate(zip(shape_of(source), shape_of(index), strict=True)):
        if other != axis and have != want:
            value = e.slice(value, other, 0, want)
    return e.call("GatherElements", value, e.value(index), axis=axis)


def index_select(e: Emitter, node: fx.Node) -> ir.Value:
    """Slices along one axis by a list of places."""
    index = e.value(ops.argument(node, "index"))
    return e.call("Gather", e.value(node.args[0]), index, axis=axis_of(node))


def index(e: Emitter, node: fx.Node) -> ir.Value:
    """Indexing by integer tensors: a view where the tensors count, else a gather."""
    source, places = node.args[0], list(ops.argument(node, "indices"))
    given = [axis for axis, place in enumerate(places) if place is not None]
    if any(type_of(places[axis]) == ir.DataType.BOOL for axis in given):
        raise UntranslatedError("indexing by a boolean mask: the size depends on the data")
    shape = shape_of(source)
    axes = [_counted_axis(places[axis], shape[axis]) for axis in given]
    ranks = {len(shape_of(places[axis])) for axis in given}
    in_order = None not in axes and sorted({axis for axis in axes if axis is not None}) == axes
    if given == list(range(len(shape))) and in_order and len(ranks) == 1:
        return e.reshape(e.value(source), shape_of(node))
    if len(given) == 1:
        place = operand(e, places[given[0]], ir.DataType.INT64)
        return e.call("Gather", e.value(source), place, axis=given[0])
    if given != list(range(len(given))):
        raise UntranslatedError("indexing by tensors on some later axes")
    return _gather_by_all(e, node, [places[axis] for axis in given])


def _gather_by_all(e: Emitter, node: fx.Node, places: list[fx.Node]) -> ir.Value:
    rest = len(shape_of(node.args[0])) - len(places)
    shape = shape_of(node)
    wide = shape[: len(shape) - rest]
    parts = []
    for place in places:
        value = e.expand(operand(e, place, ir.DataType.INT64), wide)
        parts.append(e.reshape(value, (*wide, 1)))
    return e.call("GatherND", e.value(node.args[0]), e.call("Concat", *parts, axis=-1))


def _counted_axis(place: fx.Node, size: Size) -> int | None:
    """Returns the one long axis of an index that counts 0, 1, ... up to `size`, else None."""
    found, shape = place, shape_of(place)
    while ops.is_call(found, "unsqueeze", "view", "reshape", "slice", "add", "to", "contiguous"):
        if ops.is_call(found, "add") and found.args[1] != 0:
            return None
        before = found.args[0]
        if not isinstance(before, fx.Node) or _long(shape_of(before)) != _long(shape):
            return None
        found = before
    starts = [size_of(found.args[0])] if ops.is_call(found, "arange") else [None]
    if starts != [size] or len(found.args) != 1:
        return None
    axes = [axis for axis, length in enumerate(shape) if length == size]
    return axes[0] if len(axes) == 1 else None


def _long(shape: Shape) -> list[Size]:
    return [size for size in shape if size != 1]


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
        "roll": roll, "flip": flip, "embedding": embedding, "gather": gather,
        "index_select": index_select, "index": index, "arange": arange, "tril": triangle(0),
        "triu": triangle(1),
    }
)  # fmt: skip
"""ATen base name -> translation."""
