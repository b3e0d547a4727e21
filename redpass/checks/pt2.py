"""The archive of a `.pt2`: which members may be there, and a copy of them that holds no code.

Sample inputs are dropped unread; of the model's JSON only what was checked is written anew.
"""

from __future__ import annotations

import io
import json
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from redpass.checks import archive, pt2_graph, pt2_model, pt2_schema
from redpass.errors import LoadError

MEMBER = "redpass.json"
"""Name of the extra file of a `.pt2` in which redpass keeps the signature."""

AGAIN = "export the model again with torch.export"
REFUSES = "redpass refuses what it cannot check: export"
MOST_ELEMENTS = 1 << 40

_PAYLOAD = re.compile(r"data/(weights/weight_\d+|constants/tensor_\d+)")
_CONFIG = re.compile(r"data/(weights/(\w+)_weights_config|constants/(\w+)_constants_config)\.json")
_MODEL = re.compile(r"models/(\w+)\.json")
_SAMPLE = re.compile(r"data/sample_inputs/\w+\.pt")
_VERSION = rb"([1-9]|10)\n?"
_PLAIN = {
    "archive_format": rb"pt2", "archive_version": rb"0", "byteorder": rb"little|",
    ".data/version": _VERSION, "version": _VERSION, ".format_version": _VERSION,
    ".storage_alignment": rb"\d{1,9}", ".data/serialization_id": rb"[0-9]{0,200}",
}  # fmt: skip
"""Members of a few characters -> what they may be."""

MAX_PLAIN = 4096
EXTRA = f"extra/{MEMBER}"

_WIDTHS = {
    1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 2, 7: 4, 8: 8, 9: 4, 10: 8, 11: 16, 12: 1, 13: 2, 28: 2,
    29: 1, 30: 1, 31: 1, 32: 1, 33: 1, 34: 4, 35: 8,
}  # fmt: skip
"""Bytes of an element by the number of its type (`torch._export.serde.schema.ScalarType`)."""


def check(path: Path) -> None:
    """Checks a `.pt2` without copying its weights. Raises `LoadError` where `rebuild` does."""
    _checked(path)


def rebuild(path: Path) -> io.BytesIO:
    """Copies what was checked to a new archive in memory.

    Raises:
        LoadError: damaged, or with a member, operator, expression or object that is not on the
            lists here and in `pt2_model`, or with weights that are short or missing.
    """
    texts, result = _checked(path), io.BytesIO()
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(result, "w") as target:
        for name, data in texts.items():
            target.writestr(f"archive/{name}", data)
        for member in source.infolist():
            if _PAYLOAD.fullmatch(inner(member.filename)):
                target.writestr(f"archive/{inner(member.filename)}", source.read(member))
    result.seek(0)
    return result


def _checked(path: Path) -> dict[str, bytes]:
    """Checks all members and returns the new content of those that are no weights."""
    members = archive.check(path)
    sizes = {inner(member.filename): member.file_size for member in members}
    model = _check_needed(sizes, path)
    parsed: dict[str, Any] = {}
    texts: dict[str, bytes] = {}
    with zipfile.ZipFile(path) as source:
        for member in members:
            name = inner(member.filename)
            if name in _PLAIN:
                texts[name] = _plain(source, member, name, path)
            elif _MODEL.fullmatch(name) or _CONFIG.fullmatch(name):
                data = source.read(member)
                parsed[name] = _parsed(data, name, sizes, path)
            elif not (_PAYLOAD.fullmatch(name) or _SAMPLE.fullmatch(name) or name == EXTRA):
                hint = "redpass refuses what it cannot check: export without extra files"
                raise LoadError(
                    "a member that no plain export has", file=path, place=name, hint=hint
                )
    known = {weight for name in _lists(model) for weight in parsed[name]["config"]}
    found = pt2_graph.fault(parsed[f"models/{model}.json"]["graph_module"], known)
    if found:
        raise LoadError(found, file=path, place=f"models/{model}.json", hint=AGAIN)
    texts |= {name: json.dumps(value).encode() for name, value in parsed.items()}
    return texts | {f"data/sample_inputs/{model}.pt": b""}


def extra(path: Path) -> bytes | None:
    """Returns what redpass keeps beside the graph, None for a file that something else wrote."""
    for member in archive.check(path):
        if inner(member.filename) == EXTRA:
            with zipfile.ZipFile(path) as source:
                return source.read(member)
    return None


def inner(name: str) -> str:
    """Returns a member's name without the folder that all members share."""
    return name.partition("/")[2]


def _parsed(data: bytes, name: str, sizes: Mapping[str, int], path: Path) -> Any:
    """Returns what a member of JSON holds once it was checked."""
    value = pt2_model.parse(data, path, name)
    if _MODEL.fullmatch(name):
        value = pt2_model.check_model(value, path, name)
        _check_types(value, pt2_schema.ROOT, path, name)
    else:
        _check_payloads(value, name, sizes, path)
        _check_types(value, pt2_schema.WEIGHTS, path, name)
    return value


def _check_types(value: Any, kind: str, path: Path, member: str) -> None:
    """Refuses JSON of another shape than the installed PyTorch writes."""
    place, found = pt2_schema.fault(value, kind)
    if found:
        raise LoadError(found, file=path, place=f"{member}: {place}", hint=AGAIN)


def _plain(source: zipfile.ZipFile, member: zipfile.ZipInfo, name: str, path: Path) -> bytes:
    """Reads one of the short members that say what the archive is."""
    data = source.read(member) if member.file_size <= MAX_PLAIN else b"..."
    if not re.fullmatch(_PLAIN[name], data):
        found = f"holds {data[:40]!r}, which no version of this format has"
        raise LoadError(found, file=path, place=name, hint=AGAIN)
    return data


def _check_needed(sizes: Mapping[str, int], path: Path) -> str:
    """Returns the name of the one model, once nothing is missing that belongs to it."""
    models = [found[1] for found in map(_MODEL.fullmatch, sizes) if found]
    if len(models) != 1:
        raise LoadError(f"{len(models)} models in one file, expected 1", file=path, hint=AGAIN)
    version = next((name for name in (".data/version", "version") if name in sizes), "version")
    for name in ("archive_format", "archive_version", version, *_lists(models[0])):
        if name not in sizes:
            raise LoadError("a member is missing", file=path, place=name, hint=AGAIN)
    return models[0]


def _lists(model: str) -> tuple[str, str]:
    """The members that list a model's weights and constants."""
    weights = f"data/weights/{model}_weights_config.json"
    return weights, f"data/constants/{model}_constants_config.json"


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
            width = _WIDTHS[entry["tensor_meta"]["dtype"]]
            if not pt2_model.is_device(entry["tensor_meta"]["device"]):
                raise ValueError(f"no device: {entry['tensor_meta']['device']}")
        except (KeyError, TypeError, ValueError) as error:
            found = f"a bad entry: {error!r}"
            raise LoadError(found, file=path, place=name, hint=AGAIN) from error
        if pickled is not False or not _PAYLOAD.fullmatch(member):
            hint = "save plain tensors: redpass runs no pickle of a .pt2"
            raise LoadError("a pickled or foreign weight", file=path, place=name, hint=hint)
        if member not in sizes:
            found = f"its bytes ({member}) are missing"
            raise LoadError(found, file=path, place=name, hint=AGAIN)
        if sizes[member] < wanted or sizes[member] % width:
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
