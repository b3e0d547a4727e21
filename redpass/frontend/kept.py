"""The traced program of a long run, kept beside its journal, so that a killed one need not trace.

One file: a line of JSON that says what follows and its SHA-256, the graph as JSON, the weights'
bytes. Nothing in it is run or unpickled. It is used when it was made from the same files by the
same options and versions, is whole, and gives the graph and weights that its digests say; any
other is passed over with its reason.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import io
import json
import os
import platform
import shutil
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import redpass
from redpass import trial
from redpass.artifact import staged_file
from redpass.checks.folder import model_folder
from redpass.errors import RedpassError
from redpass.frontend import fakes
from redpass.frontend.dims import Dims, evaluate
from redpass.frontend.normalise import Core
from redpass.frontend.trace import warn_of_nan, weights_digest
from redpass.graph_json import from_json, to_json
from redpass.manifest import digest
from redpass.program import Origin, Program, Signature
from redpass.stored import from_text, to_text
from redpass.verify.rules import check_rules

FORMAT = "redpass-traced-1"
LARGEST_HEAD, LARGEST_TEXT = 1 << 12, 1 << 28
LARGEST_WEIGHTS, SHARE = 4 << 30, 10
"""Bytes of weights up to which copying them costs less than tracing again; and which part of the
disk's free space a copy may take, so that it is never what the result has no room for."""

_NO_PROGRAM = (
    RedpassError, OSError, ValueError, KeyError, TypeError, IndexError, AttributeError,
    RuntimeError, RecursionError,
)  # fmt: skip
"""What reading a file that is no kept program may end in."""


def key_of(path: Path, *options: object) -> str:
    """Returns what a program that is loaded from `path` follows from, as a digest.

    Args:
        path: the model's file or folder.
        options: what else decides; files among them count by their content.
    """
    names = ("torch", "transformers", "diffusers", "safetensors")
    versions = [(name, _version(name)) for name in names]
    total = hashlib.sha256(repr((platform.python_version(), versions, str(path))).encode())
    sources = Path(redpass.__file__).parent.rglob("*.py")
    for file in (*sorted(sources), *_files(path)):
        total.update(f"{file.name} {digest(file)}\n".encode())
    for option in options:
        text = digest(option) if isinstance(option, Path) and option.is_file() else repr(option)
        total.update(f"{text}\n".encode())
    return total.hexdigest()


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _files(path: Path) -> list[Path]:
    """The files that a model is read from."""
    if not path.is_dir():
        return [path]
    found = model_folder(path).iterdir()
    return sorted(p for p in found if p.suffix in (".json", ".safetensors") and p.is_file())


def load_kept(path: Path, key: str, load: Callable[[], Program], *, resume: bool) -> Program:
    """Returns the program kept at `path`, or what `load` gives, which is then kept there.

    Args:
        key: what the program follows from: digests of files, options, versions.
        resume: whether what lies at `path` may be used.
    """
    if resume and os.path.lexists(path):
        try:
            program = read(path, key)
        except _NO_PROGRAM as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            warnings.warn(f"the kept program is not used: {reason}; tracing again", stacklevel=2)
        else:
            warn_of_nan(program.weights)
            return program
    program = load()
    try:
        write(program, path, key)
    except TypeError:
        path.unlink(missing_ok=True)  # it holds something that JSON cannot
    except RedpassError as error:
        warnings.warn(f"the traced program is not kept: {error.found}", stacklevel=2)
    return program


def write(program: Program, path: Path, key: str) -> None:
    """Keeps `program` at `path`, whole or not at all.

    Raises:
        TypeError: it holds a value or a weight that has no plain form.
        OutputError: the disk is full or fails.
    """
    weights = _Stored.of(program.weights)
    size = sum(map(len, weights.blocks))
    if size > min(LARGEST_WEIGHTS, shutil.disk_usage(path.parent).free // SHARE):
        raise TypeError(f"{size} bytes of weights are too many to be copied")
    text = json.dumps(
        {
            "signature": to_text(program),
            "sizes": _hints(program),
            "origin": asdict(replace(program.origin, config=dict(program.origin.config))),
            "digest": program.digest,
            "graph": to_json(program.graph),
            "blocks": [len(block) for block in weights.blocks],
            "weights": weights.places,
        }
    ).encode()
    total = hashlib.sha256(text)
    for block in weights.blocks:
        total.update(block)
    head = {"format": FORMAT, "key": key, "text": len(text), "sha256": total.hexdigest()}
    with staged_file(path, force=True) as place, place.open("wb") as file:
        file.write(json.dumps(head).encode() + b"\n")
        file.write(text)
        for block in weights.blocks:
            file.write(block)


def read(path: Path, key: str) -> Program:
    """Reads a program that `write` kept.

    Raises:
        ValueError: made from something else, damaged, or not what its digests say.
        RedpassError, OSError, KeyError, TypeError, IndexError, AttributeError, RuntimeError: none.
    """
    number = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0))
    with os.fdopen(number, "rb") as file:
        head = json.loads(file.readline(LARGEST_HEAD))
        if head["format"] != FORMAT or head["key"] != key:
            raise ValueError("it is of another model, other options or another version")
        if not 0 < head["text"] < LARGEST_TEXT:
            raise ValueError(f"a graph of {head['text']} bytes")
        text = file.read(head["text"])
        total = hashlib.sha256(text)
        data = json.loads(text)
        trial.register_ops(text)
        left = path.stat().st_size - file.tell()
        if sum(map(_size, data["blocks"])) != left:
            raise ValueError("it is cut short")
        blocks = [_block(file, size, total) for size in data["blocks"]]
    if total.hexdigest() != head["sha256"]:
        raise ValueError("it is damaged")
    return _program(data, blocks, path)


def _size(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r} is no size")
    return value


def _block(file: io.BufferedReader, size: int, total: Any) -> Tensor:
    """Reads one block of bytes into memory of its own, aligned as PyTorch aligns."""
    block = torch.empty(size, dtype=torch.uint8)
    view = _bytes(block)
    if file.readinto(view) != size:
        raise ValueError("it is cut short")
    total.update(view)
    return block


def _program(data: Any, blocks: list[Tensor], path: Path) -> Program:
    ports = from_text(data["signature"].encode(), path).signature
    notes = tuple(map(str, data["origin"]["notes"]))
    origin = Origin(**{**data["origin"], "notes": notes})
    weights = {name: _weight(blocks, *place) for name, place in data["weights"].items()}
    core = Core(from_json(data["graph"]), weights)
    outputs = tuple(port.name for port in ports.outputs)
    found = fakes.propagate(core, _dims(ports, data["sizes"]), outputs, [])
    program = Program(core.graph, weights, replace(found, state=ports.state), origin)
    check_rules(program)
    if program.digest != data["digest"] or weights_digest(weights) != origin.digest:
        raise ValueError("its graph or weights are not those that were kept")
    return program


def _weight(blocks: list[Tensor], number: int, dtype: str, *place: Any) -> Tensor:
    kind = getattr(torch, dtype)
    if not isinstance(kind, torch.dtype):
        raise ValueError(f"no kind of number: {dtype}")
    shape, strides, offset = place
    return blocks[number].view(kind).as_strided(shape, strides, offset)


def _dims(ports: Signature, sizes: Mapping[str, int]) -> Dims:
    """The dimensions of a signature at the sizes that the program was traced at."""
    known = {name: _size(sizes[name]) for name in ports.dims}
    example = {
        port.name: torch.zeros((), dtype=port.dtype).expand(
            [int(evaluate(size, known)) for size in port.shape]
        )
        for port in ports.inputs
    }
    axes = {port.name: port.shape for port in ports.inputs}
    return Dims(example, axes, known, dict(ports.dims))


def _hints(program: Program) -> dict[str, int]:
    """Dimension name -> the size that its symbol stands for while sizes are traced."""
    return {
        str(size.node.expr): int(size.node.hint)
        for node in program.inputs
        for size in node.meta["val"].shape
        if isinstance(size, torch.SymInt) and str(size.node.expr) in program.signature.dims
    }


def _bytes(tensor: Tensor) -> memoryview:
    view: Any = tensor.numpy()
    return memoryview(view)


@dataclass(frozen=True)
class _Stored:
    """Weights as blocks of bytes, one for each memory that they lie in.

    Attributes:
        places: name -> block, dtype, shape, strides, offset in elements.
    """

    blocks: list[memoryview]
    places: dict[str, list[Any]]

    @staticmethod
    def of(weights: Mapping[str, Tensor]) -> _Stored:
        numbers: dict[int, int] = {}
        blocks: list[memoryview] = []
        places: dict[str, list[Any]] = {}
        for name, tensor in weights.items():
            if type(tensor) not in (Tensor, torch.nn.Parameter) or tensor.device.type != "cpu":
                raise TypeError(f"the weight '{name}' has no plain form")
            memory = tensor.untyped_storage()
            if memory.data_ptr() not in numbers:
                numbers[memory.data_ptr()] = len(blocks)
                blocks.append(_bytes(torch.empty(0, dtype=torch.uint8).set_(memory)))
            places[name] = [
                numbers[memory.data_ptr()],
                str(tensor.dtype).removeprefix("torch."),
                list(tensor.shape),
                list(tensor.stride()),
                tensor.storage_offset(),
            ]
        return _Stored(blocks, places)
