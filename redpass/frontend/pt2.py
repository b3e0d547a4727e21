"""`.pt2`: checked as data, written anew without anything that runs, then given to PyTorch."""

from __future__ import annotations

import io
import json
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram

from redpass.errors import LoadError
from redpass.frontend import archive, pt2_check
from redpass.stored import MEMBER, Stored, from_text

_PAYLOAD = re.compile(r"data/(weights/weight_\d+|constants/tensor_\d+)")
_CONFIG = re.compile(r"data/(weights/(\w+)_weights_config|constants/(\w+)_constants_config)\.json")
_MODEL = re.compile(r"models/(\w+)\.json")
_SAMPLE = re.compile(r"data/sample_inputs/\w+\.pt")
_PLAIN = frozenset(
    {"archive_format", "archive_version", "byteorder", ".data/version", ".data/serialization_id",
     ".format_version", ".storage_alignment", "version"}
)  # fmt: skip


def load_exported(path: Path) -> ExportedProgram:
    """Reads a `.pt2` without running anything in it.

    Sample inputs are dropped unread, guards and most metadata too: a program needs none of them.

    Raises:
        LoadError: damaged, or with a member, operator, expression or object that is not on the
            lists of `pt2_check`; or refused by `torch.export.load`.
    """
    members = archive.check(path)
    safe = _rebuild(path, members)
    try:
        return torch.export.load(safe)
    except Exception as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise LoadError(
            f"torch.export.load refuses it: {type(error).__name__}: {first}",
            file=path,
            hint="export the model again with this version of PyTorch",
        ) from error


def read_stored(path: Path) -> Stored | None:
    """Returns what redpass wrote beside the graph, None for a file that something else wrote.

    Raises:
        LoadError: no whole archive, or a signature that is damaged.
    """
    for member in archive.check(path):
        if _inner(member.filename) == f"extra/{MEMBER}":
            with zipfile.ZipFile(path) as source:
                return from_text(source.read(member), path)
    return None


def _rebuild(path: Path, members: list[zipfile.ZipInfo]) -> io.BytesIO:
    """Copies what was checked to a new archive in memory."""
    result = io.BytesIO()
    models = 0
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(result, "w") as target:
        sizes = {_inner(m.filename): m.file_size for m in members}
        for member in members:
            name = _inner(member.filename)
            models += bool(_MODEL.fullmatch(name))
            for new, data in _member(source, member, name, sizes, path):
                target.writestr(f"archive/{new}", data)
    if models != 1:
        raise LoadError(f"{models} models in one file, expected 1", file=path)
    result.seek(0)
    return result


def _inner(name: str) -> str:
    return name.partition("/")[2]


def _member(
    source: zipfile.ZipFile,
    member: zipfile.ZipInfo,
    name: str,
    sizes: dict[str, int],
    path: Path,
) -> Iterator[tuple[str, bytes]]:
    if name == f"extra/{MEMBER}":
        return  # `read_stored` reads it, PyTorch need not
    if name in _PLAIN or _PAYLOAD.fullmatch(name):
        yield name, source.read(member)
    elif _MODEL.fullmatch(name):
        model = pt2_check.parse(source.read(member), path, name)
        yield name, json.dumps(pt2_check.check_model(model, path, name)).encode()
        yield f"data/sample_inputs/{name[7:-5]}.pt", b""
    elif _CONFIG.fullmatch(name):
        config = pt2_check.parse(source.read(member), path, name)
        _check_payloads(config, name, sizes, path)
        yield name, json.dumps(config).encode()
    elif not _SAMPLE.fullmatch(name):
        raise LoadError(
            "a member that no plain export has",
            file=path,
            place=name,
            hint="redpass refuses what it cannot check: export without extra files",
        )


def _check_payloads(config: Any, place: str, sizes: dict[str, int], path: Path) -> None:
    """Checks that every weight is raw bytes of its own folder, and long enough."""
    folder = place.rpartition("/")[0]
    entries = config.get("config") if isinstance(config, dict) else None
    if not isinstance(entries, dict):
        raise LoadError("no list of weights", file=path, place=place)
    for name, entry in entries.items():
        try:
            member, pickled = f"{folder}/{entry['path_name']}", entry["use_pickle"]
            meta = entry["tensor_meta"]
            lengths = [int(size["as_int"]) for size in meta["sizes"]]
            [int(size["as_int"]) for size in meta["strides"]]
        except (KeyError, TypeError, ValueError) as error:
            raise LoadError(f"a bad entry: {error!r}", file=path, place=name) from error
        if pickled is not False or not _PAYLOAD.fullmatch(member):
            raise LoadError(
                "a pickled or foreign weight",
                file=path,
                place=name,
                hint="save plain tensors: redpass runs no pickle of a .pt2",
            )
        if member not in sizes:
            raise LoadError(f"its bytes ({member}) are missing", file=path, place=name)
        if not sizes[member] and 0 not in lengths:
            raise LoadError(f"its bytes ({member}) are empty", file=path, place=name)
