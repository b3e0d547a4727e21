"""The archive of a `.pt2`: which members may be there, and a copy of them that holds no code.

Sample inputs are dropped unread; of the model's JSON only what was checked is written anew.
"""

from __future__ import annotations

import io
import json
import re
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from redpass.checks import archive, pt2_model
from redpass.errors import LoadError

MEMBER = "redpass.json"
"""Name of the extra file of a `.pt2` in which redpass keeps the signature."""

AGAIN = "export the model again with torch.export"
REFUSES = f"redpass refuses what it cannot check: {AGAIN}"
MOST_ELEMENTS = 1 << 40

_PAYLOAD = re.compile(r"data/(weights/weight_\d+|constants/tensor_\d+)")
_CONFIG = re.compile(r"data/(weights/(\w+)_weights_config|constants/(\w+)_constants_config)\.json")
_MODEL = re.compile(r"models/(\w+)\.json")
_SAMPLE = re.compile(r"data/sample_inputs/\w+\.pt")
_PLAIN = frozenset(
    {"archive_format", "archive_version", "byteorder", ".data/version", ".data/serialization_id",
     ".format_version", ".storage_alignment", "version"}
)  # fmt: skip
MAX_PLAIN = 4096

_WIDTHS = {
    1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 2, 7: 4, 8: 8, 9: 4, 10: 8, 11: 16, 12: 1, 13: 2, 28: 2,
    29: 1, 30: 1, 31: 1, 32: 1, 33: 1, 34: 4, 35: 8,
}  # fmt: skip
"""Bytes of an element by the number of its type (`torch._export.serde.schema.ScalarType`)."""


def check(path: Path) -> None:
    """Checks a `.pt2`. Raises `LoadError` where `rebuild` does."""
    rebuild(path)


def rebuild(path: Path) -> io.BytesIO:
    """Copies what was checked to a new archive in memory.

    Raises:
        LoadError: damaged, or with a member, operator, expression or object that is not on the
            lists here and in `pt2_model`, or with weights that are short or missing.
    """
    members = archive.check(path)
    result = io.BytesIO()
    models = 0
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(result, "w") as target:
        sizes = {inner(m.filename): m.file_size for m in members}
        for member in members:
            name = inner(member.filename)
            models += bool(_MODEL.fullmatch(name))
            for new, data in _member(source, member, name, sizes, path):
                target.writestr(f"archive/{new}", data)
    if models != 1:
        raise LoadError(f"{models} models in one file, expected 1", file=path, hint=AGAIN)
    result.seek(0)
    return result


def extra(path: Path) -> bytes | None:
    """Returns what redpass keeps beside the graph, None for a file that something else wrote."""
    for member in archive.check(path):
        if inner(member.filename) == f"extra/{MEMBER}":
            with zipfile.ZipFile(path) as source:
                return source.read(member)
    return None


def inner(name: str) -> str:
    """Returns a member's name without the folder that all members share."""
    return name.partition("/")[2]


def _member(
    source: zipfile.ZipFile,
    member: zipfile.ZipInfo,
    name: str,
    sizes: Mapping[str, int],
    path: Path,
) -> Iterator[tuple[str, bytes]]:
    if name == f"extra/{MEMBER}":
        return  # `extra` reads it, PyTorch need not
    if (name in _PLAIN and member.file_size <= MAX_PLAIN) or _PAYLOAD.fullmatch(name):
        yield name, source.read(member)
    elif _MODEL.fullmatch(name):
        model = pt2_model.parse(source.read(member), path, name)
        yield name, json.dumps(pt2_model.check_model(model, path, name)).encode()
        yield f"data/sample_inputs/{name[7:-5]}.pt", b""
    elif _CONFIG.fullmatch(name):
        config = pt2_model.parse(source.read(member), path, name)
        _check_payloads(config, name, sizes, path)
        yield name, json.dumps(config).encode()
    elif not _SAMPLE.fullmatch(name):
        hint = "redpass refuses what it cannot check: export without extra files"
        raise LoadError("a member that no plain export has", file=path, place=name, hint=hint)


def _check_payloads(config: Any, place: str, sizes: Mapping[str, int], path: Path) -> None:
    """Checks that every weight is raw bytes of its own folder, and long enough."""
    folder = place.rpartition("/")[0]
    entries = config.get("config") if isinstance(config, dict) else None
    if not isinstance(entries, dict):
        raise LoadError("no list of weights", file=path, place=place, hint=AGAIN)
    for name, entry in entries.items():
        try:
            member, pickled = f"{folder}/{entry['path_name']}", entry["use_pickle"]
            wanted = _bytes(entry["tensor_meta"])
        except (KeyError, TypeError, ValueError) as error:
            found = f"a bad entry: {error!r}"
            raise LoadError(found, file=path, place=name, hint=AGAIN) from error
        if pickled is not False or not _PAYLOAD.fullmatch(member):
            hint = "save plain tensors: redpass runs no pickle of a .pt2"
            raise LoadError("a pickled or foreign weight", file=path, place=name, hint=hint)
        if member not in sizes:
            found = f"its bytes ({member}) are missing"
            raise LoadError(found, file=path, place=name, hint=AGAIN)
        if sizes[member] < wanted:
            found = f"its bytes ({member}) are {sizes[member]}, its shape takes {wanted}"
            raise LoadError(found, file=path, place=name, hint=AGAIN)


def _bytes(meta: Any) -> int:
    """Returns how many bytes a tensor's storage must have."""
    lengths = [_whole(size["as_int"]) for size in meta["sizes"]]
    strides = [_whole(size["as_int"]) for size in meta["strides"]]
    offset = meta["storage_offset"]
    start = _whole(offset["as_int"] if isinstance(offset, dict) else offset)
    elements = 1
    for length in lengths:
        elements *= length
    if elements > MOST_ELEMENTS or len(lengths) != len(strides):
        raise ValueError(f"shape {lengths} with strides {strides}")
    if not elements:
        return 0
    last = sum((n - 1) * step for n, step in zip(lengths, strides, strict=True))
    return (start + last + 1) * _WIDTHS[meta["dtype"]]


def _whole(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 2**63:
        raise ValueError(f"{value!r} is no size")
    return value
