"""Valid random inputs for any sizes: read off the graph, not off a table of known models.

An integer input that an embedding reads gets numbers below its rows; one that counts positions
counts from the past length; one that masks is ones. Floats are normal.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, fx

from redpass import ops
from redpass.errors import DataError
from redpass.program import Port, Program
from redpass.verify.sizes import concrete, parse_size

USUAL: Mapping[str, int] = {"batch": 2, "seq": 7, "past": 3}
"""Sizes of well-known dimensions; any other gets the smallest it allows, at least 3."""

CHECKED: tuple[Mapping[str, int], ...] = (
    {"batch": 3, "seq": 5, "past": 0},
    {"batch": 1, "seq": 1, "past": 6},
    {"batch": 3, "seq": 17, "past": 4},
    {"batch": 1, "seq": 29, "past": 0},
)
"""The sizes `check_inputs` goes through: prefill, decode, and longer odd ones."""

STEPS = 1000
"""Integers no embedding bounds (the time steps of a denoiser) are below this."""


def random_inputs(
    program: Program, sizes: Mapping[str, int] | None = None, *, seed: int = 0
) -> dict[str, Tensor]:
    """Returns valid random inputs by port name.

    Args:
        sizes: dimension name -> size, taken as it is; the others get a usual size within the
            program's ranges.
        seed: seeds a generator of its own; equal seeds give equal inputs.
    """
    generator = torch.Generator().manual_seed(seed)
    full = {name: _within(program, name, USUAL.get(name, 3)) for name in _dimensions(program)}
    full |= dict(sizes or {})
    return {
        port.name: _value(program, port, concrete(port.shape, full), full, generator)
        for port in program.signature.inputs
    }


def check_inputs(program: Program, *, rounds: int = 4, seed: int = 0) -> list[dict[str, Tensor]]:
    """Returns the inputs before and after are compared on.

    Batch 1 and 3, sequences of 1, 5 and longer odd lengths, past 0 and some; where an input masks
    the sequence, padding on the right in one round and on the left in another. Sizes stay within
    the program's ranges and its tables of positions.
    """
    limit, found = max(1, _longest(program) // 2), []
    names = _dimensions(program)
    for number, wanted in enumerate(CHECKED[:rounds]):
        cut = {name: size if name == "batch" else min(size, limit) for name, size in wanted.items()}
        sizes = {name: _within(program, name, size) for name, size in cut.items() if name in names}
        values = random_inputs(program, sizes, seed=seed + number)
        side = {0: "right", 2: "left"}.get(number)
        found.append(_padded(program, values, side) if side else values)
    return found


def _dimensions(program: Program) -> list[str]:
    """The names of all dimensions that the inputs' sizes are made of."""
    sizes = (size for port in program.signature.inputs for size in port.shape)
    used = [parse_size(size).free_symbols for size in sizes if isinstance(size, str)]
    return sorted({str(item) for items in used for item in items} | program.signature.dims.keys())


def _within(program: Program, name: str, size: int) -> int:
    low, high = program.signature.dims.get(name, (0, None))
    return max(low, size if high is None else min(size, high))


def _value(
    program: Program,
    port: Port,
    shape: tuple[int, ...],
    sizes: Mapping[str, int],
    generator: torch.Generator,
) -> Tensor:
    if "mask" in port.name:
        return _open_mask(port, shape)
    if port.dtype.is_floating_point or port.dtype.is_complex:
        return torch.randn(shape, generator=generator).to(port.dtype)
    if port.dtype is torch.bool:
        return torch.ones(shape, dtype=torch.bool)
    rows = _rows(program.input_node(port.name))
    if "position" in port.name and shape:
        past = sizes.get("past", 0)
        counted = torch.arange(past, past + shape[-1], dtype=port.dtype) % (rows or 2**31 - 1)
        return counted.expand(shape).contiguous()
    if rows is None and len(shape) >= 2:
        return _open_mask(port, shape)
    return torch.randint(0, rows or STEPS, shape, generator=generator, dtype=port.dtype)


def _open_mask(port: Port, shape: tuple[int, ...]) -> Tensor:
    """A mask that hides nothing: ones, or zeros where it is added to scores."""
    filled = 0 if port.dtype.is_floating_point else 1
    return torch.full(shape, filled, dtype=port.dtype)


def _rows(node: fx.Node) -> int | None:
    """The fewest rows of the embeddings that `node`'s elements index, or None."""
    found = [_table_rows(reader) for reader in _index_readers(node)]
    return min(found, default=None)


def _index_readers(node: fx.Node) -> Iterator[fx.Node]:
    """Embeddings that read the input as an index, through views, copies and casts."""
    todo, seen = [node], {node}
    while todo:
        value = todo.pop()
        for user in value.users:
            if ops.is_call(user, "embedding") and user.args[1] is value:
                yield user
            elif user not in seen and (ops.is_view(user) or ops.is_call(user, *_UNCHANGED)):
                seen.add(user)
                todo.append(user)


_UNCHANGED = ("to", "_to_copy", "clone", "contiguous", "where", "masked_fill", "clamp", "ne")


def _table_rows(embedding: fx.Node) -> int:
    table = embedding.args[0]
    assert isinstance(table, fx.Node)
    return int(table.meta["val"].shape[0])


def _longest(program: Program) -> int:
    """The fewest rows of the embeddings that no input's elements index: position tables."""
    direct = {
        reader
        for node in program.inputs
        if "position" not in node.name
        for reader in _index_readers(node)
    }
    tables = [
        _table_rows(node)
        for node in program.graph.nodes
        if ops.is_call(node, "embedding") and node not in direct and _counts(node)
    ]
    return min(tables, default=2**31)


def _counts(embedding: fx.Node) -> bool:
    """Whether the index is made of a range, a running sum or a position input."""
    todo, seen = [embedding.args[1]], set()
    while todo:
        node = todo.pop()
        if not isinstance(node, fx.Node) or node in seen:
            continue
        seen.add(node)
        if ops.is_call(node, "arange", "cumsum") or "position" in node.name:
            return True
        todo.extend(node.all_input_nodes)
    return False


def _padded(program: Program, values: dict[str, Tensor], side: str) -> dict[str, Tensor]:
    """Masks out part of every second row, wherever an integer or bool input masks a sequence."""
    padded = dict(values)
    for port in program.signature.inputs:
        value = values[port.name]
        masks = "mask" in port.name and not port.dtype.is_floating_point
        if masks and value.dim() == 2 and value.shape[1] > 2:
            padded[port.name] = _pad(value, side)
    return padded


def _pad(mask: Tensor, side: str) -> Tensor:
    hidden = max(1, mask.shape[1] // 3)
    mask = mask.clone()
    part: Sequence[int] | slice = slice(0, hidden) if side == "left" else slice(-hidden, None)
    mask[::2, part] = 0
    return mask


def complete(program: Program, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the program's inputs from a batch, with what a batch may leave out.

    An empty past for state (made anew where the batch has one: heads may be fewer by now), a mask
    of ones, positions counted over the mask, zeros for token types. Values of another width
    (int32, float32 for bfloat16) are cast; extras are ignored.

    Raises:
        DataError: an input that is missing and cannot be made up.
    """
    sizes = _sizes_of(program, batch)
    state = {name for name, _ in program.signature.state}
    values = {}
    for port in program.signature.inputs:
        is_past = port.name in state
        if port.name in batch and not (is_past and batch[port.name].numel() == 0):
            values[port.name] = _as_port(port, batch[port.name])
        elif is_past:
            values[port.name] = torch.zeros(concrete(port.shape, sizes), dtype=port.dtype)
        else:
            values[port.name] = _default(port, batch, sizes)
    return values


def output_shape(program: Program, batch: Mapping[str, Tensor], name: str) -> tuple[int, ...]:
    """Returns the shape the output `name` has for a batch, from the signature, running nothing."""
    return concrete(program.signature.output(name).shape, _sizes_of(program, batch))


def _sizes_of(program: Program, batch: Mapping[str, Tensor]) -> dict[str, int]:
    sizes = dict.fromkeys(_dimensions(program), 0)
    for port in program.signature.inputs:
        for name, size in zip(port.shape, getattr(batch.get(port.name), "shape", ()), strict=False):
            if name in sizes:
                sizes[str(name)] = size
    return sizes


def _as_port(port: Port, value: Tensor) -> Tensor:
    alike = port.dtype.is_floating_point == value.dtype.is_floating_point
    return value.to(port.dtype) if alike else value


def _default(port: Port, batch: Mapping[str, Tensor], sizes: Mapping[str, int]) -> Tensor:
    shape = concrete(port.shape, sizes)
    if "mask" in port.name:
        return _open_mask(port, shape)
    if "token_type" in port.name:
        return torch.zeros(shape, dtype=port.dtype)
    if "position" in port.name and shape:
        mask = batch.get("attention_mask")
        if mask is not None and mask.shape == shape:
            return (mask.long().cumsum(-1) - 1).clamp_min(0).to(port.dtype)
        return torch.arange(shape[-1], dtype=port.dtype).expand(shape).contiguous()
    hint = f"the data hold {', '.join(batch)}"
    raise DataError("the batches do not hold this input", place=f"input '{port.name}'", hint=hint)
