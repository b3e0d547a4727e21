"""A program's signature as text, kept beside its graph in files that redpass writes.

A `.pt2` holds positions and Python identifiers; port names with dots, state pairs, dimension
names and the task travel in this text. What is read back is checked, never believed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from redpass.checks.pt2 import MEMBER
from redpass.errors import LoadError
from redpass.program import Port, Program, Shape, Signature

FORMAT, LONGEST = 1, 1 << 24
_WORD = re.compile(r"[A-Za-z_]\w*")
_SIZE = re.compile(r"[\w ,+*/()%-]{1,200}")
_DTYPES = {
    str(value).removeprefix("torch."): value
    for value in vars(torch).values()
    if isinstance(value, torch.dtype)
}


@dataclass(frozen=True)
class Stored:
    """What a file says about the program in it."""

    signature: Signature
    task: str


def to_text(program: Program) -> str:
    """Returns the signature and task of `program` as JSON."""
    signature = program.signature
    return json.dumps(
        {
            "format": FORMAT,
            "task": program.origin.task,
            "inputs": list(map(_listed, signature.inputs)),
            "outputs": list(map(_listed, signature.outputs)),
            "state": list(map(list, signature.state)),
            "dims": {name: list(limits) for name, limits in signature.dims.items()},
        }
    )


def _listed(port: Port) -> list[Any]:
    return [port.name, str(port.dtype).removeprefix("torch."), list(port.shape)]


def from_text(text: bytes, file: object) -> Stored:
    """Reads what `to_text` wrote.

    Raises:
        LoadError: another format, or anything that is not a whole signature.
    """
    try:
        if len(text) > LONGEST:
            raise ValueError(f"{len(text)} bytes")
        value = json.loads(text)
        if value["format"] != FORMAT:
            raise ValueError(f"format {value['format']!r}, expected {FORMAT}")
        return Stored(_signature(value), _text(value["task"]))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise LoadError(
            f"not a signature that redpass wrote: {error}",
            file=file,
            place=f"extra/{MEMBER}",
            hint="write the file again with this version of redpass",
        ) from error


def _signature(value: Mapping[str, Any]) -> Signature:
    inputs, outputs = (tuple(map(_port, value[key])) for key in ("inputs", "outputs"))
    names = [{port.name for port in ports} for ports in (inputs, outputs)]
    if [len(names[0]), len(names[1])] != [len(inputs), len(outputs)]:
        raise ValueError("two ports of one name")
    state = tuple((_text(source), _text(result)) for source, result in value["state"])
    for source, result in state:
        if source not in names[0] or result not in names[1]:
            raise ValueError(f"state '{source}' -> '{result}' is not an input and an output")
    return Signature(inputs, outputs, state, dict(map(_range, value["dims"].items())))


def _port(value: Any) -> Port:
    name, dtype, shape = value
    return Port(_text(name), _DTYPES[dtype], _shape(shape))


def _shape(sizes: Any) -> Shape:
    for size in sizes:
        if not (_is_size(size) or (isinstance(size, str) and _SIZE.fullmatch(size))):
            raise ValueError(f"size {size!r}")
    return tuple(sizes)


def _range(item: tuple[str, Any]) -> tuple[str, tuple[int, int | None]]:
    name, (low, high) = item
    if not _WORD.fullmatch(name) or not _is_size(low) or not (high is None or _is_size(high)):
        raise ValueError(f"dimension {name!r} of range {low!r} to {high!r}")
    return name, (low, high)


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _text(value: Any) -> str:
    if not isinstance(value, str) or not 0 < len(value) < 1000:
        raise ValueError(f"name {value!r}")
    return value
