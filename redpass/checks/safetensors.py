"""Checks safetensors files before anything maps them: header, offsets, sizes, shards."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from redpass.checks import archive
from redpass.errors import LoadError

WIDTHS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F4": 4, "F6_E2M3": 6,
    "F6_E3M2": 6, "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32,
    "F64": 64, "I64": 64, "U64": 64, "C64": 64,
}  # fmt: skip
"""Bits of an element, from the format's description (huggingface/safetensors, README)."""

MAX_HEADER = 100 << 20
LFS = b"version https://git-lfs"
FETCH = "fetch the file again"
MAX_INDEX = 64 << 20


def check_folder(folder: Path) -> dict[str, tuple[int, ...]]:
    """Checks the weights of a Hugging Face folder, one file or shards with an index.

    Returns:
        Name of each tensor -> its shape.

    Raises:
        LoadError: no weights, only pickled weights, a missing shard, or a damaged file.
    """
    for stem in ("model", "diffusion_pytorch_model"):
        index, single = folder / f"{stem}.safetensors.index.json", folder / f"{stem}.safetensors"
        if single.exists() or single.is_symlink():
            return _shapes(check_file(single))
        if index.is_file():
            return _check_shards(folder, index)
    pickled = sorted(path.name for path in folder.glob("*.bin"))
    raise LoadError(
        f"only pickled weights ({', '.join(pickled)})" if pickled else "no model.safetensors",
        file=folder,
        hint="convert them to safetensors where they come from: redpass reads no pickles here"
        if pickled
        else "a Hugging Face folder holds config.json and model.safetensors",
    )


def _shapes(header: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(entry["shape"]) for name, entry in header.items()}


def _check_shards(folder: Path, index: Path) -> dict[str, tuple[int, ...]]:
    if archive.file_size(index, FETCH) > MAX_INDEX:
        raise LoadError(f"larger than {MAX_INDEX} bytes", file=index, hint=FETCH)
    there = {path.name for path in folder.iterdir()}
    try:
        table = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        wanted = {str(name): str(file) for name, file in table.items()}
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise LoadError(f"not an index of shards: {error!r}", file=index, hint=FETCH) from error
    held: dict[str, dict[str, tuple[int, ...]]] = {}
    for file in sorted(set(wanted.values())):
        if Path(file).name != file:
            raise LoadError(f"a shard outside the folder: {file}", file=index, hint=FETCH)
        if file not in there:
            raise LoadError(
                "a shard is missing", file=index, place=file, hint="fetch all files of the model"
            )
        held[file] = _shapes(check_file(folder / file))
    lost = [name for name, file in wanted.items() if name not in held[file]]
    if lost:
        raise LoadError(
            f"not in the shard the index names ({wanted[lost[0]]})",
            file=index,
            place=lost[0],
            hint="fetch all files of the model again",
        )
    return {name: shape for file in held.values() for name, shape in file.items()}


def check_file(path: Path) -> dict[str, Any]:
    """Checks one safetensors file and returns its header without metadata.

    Reads the header only. Every byte after it must belong to exactly one tensor.

    Raises:
        LoadError: missing, empty, a git-lfs pointer, truncated, or a header that lies.
    """
    size = _size(path)
    with path.open("rb") as file:
        start = file.read(max(8, len(LFS)))
        if start.startswith(LFS):
            raise LoadError(
                "a git-lfs pointer, not the weights", file=path, hint="run `git lfs pull`"
            )
        length = int.from_bytes(start[:8], "little")
        if size < 8 or length > min(MAX_HEADER, size - 8):
            raise LoadError(
                f"truncated or no safetensors: {size} bytes, the header alone claims {length}",
                file=path,
                hint=FETCH,
            )
        file.seek(8)
        header = _parse(file.read(length), path)
    header.pop("__metadata__", None)
    _check_layout(header, size - 8 - length, path)
    return header


def _size(path: Path) -> int:
    size = archive.file_size(path, "fetch all files of the model")
    if not size:
        raise LoadError("empty file", file=path, hint=FETCH)
    return size


def _parse(text: bytes, path: Path) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError("a name occurs twice")
        return found

    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise LoadError(f"the header is not JSON: {error}", file=path, hint=FETCH) from error
    if not isinstance(header, dict):
        raise LoadError("the header is not a JSON object", file=path, hint=FETCH)
    return header


def _check_layout(header: Mapping[str, Any], data: int, path: Path) -> None:
    spans = sorted((*_span(name, entry, path), name) for name, entry in header.items())
    end = 0
    for first, last, name in spans:
        if first != end:
            kind = "overlaps the tensor before it" if first < end else "leaves a hole before it"
            found = f"{kind} (offset {first}, expected {end})"
            raise LoadError(found, file=path, place=name, hint=FETCH)
        end = last
    if end != data:
        raise LoadError(
            f"truncated: {data} bytes of data, the header lists {end}"
            if end > data
            else f"{data - end} bytes that belong to no tensor",
            file=path,
            place=next((name for _, last, name in spans if last > data), None),
            hint=FETCH,
        )


def _span(name: str, entry: Any, path: Path) -> tuple[int, int]:
    try:
        bits, shape, (first, last) = (
            WIDTHS[entry["dtype"]],
            entry["shape"],
            entry["data_offsets"],
        )
        for number in (*shape, first, last):
            if type(number) is not int or number < 0:
                raise ValueError(f"{number!r} is no size")
    except (KeyError, TypeError, ValueError) as error:
        raise LoadError(f"a bad entry: {error!r}", file=path, place=name, hint=FETCH) from error
    elements = 1
    for number in shape:
        elements *= number
    if elements * bits != (last - first) * 8:
        raise LoadError(
            f"{entry['dtype']}{shape} does not fit {last - first} bytes",
            file=path,
            place=name,
            hint=FETCH,
        )
    return first, last
