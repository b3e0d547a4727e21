"""`.pt2`: checked as data, written anew without anything that runs, then given to PyTorch."""

from __future__ import annotations

import io
import json
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import sympy
import torch
from torch import SymInt, Tensor
from torch.export import ExportedProgram

from redpass.errors import LoadError
from redpass.frontend import archive, pt2_check
from redpass.frontend.dims import Dims, evaluate

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


def describe(exported: ExportedProgram) -> tuple[Dims, tuple[str, ...]]:
    """Names the dimensions of an exported program's inputs. Returns them and output names.

    The first axis is `batch`, the second of integer inputs `seq`; other symbols keep a number.
    """
    nodes = {node.name: node for node in exported.graph.nodes if node.op == "placeholder"}
    values = {str(n): nodes[str(n)].meta["val"] for n in exported.graph_signature.user_inputs}
    for name, value in values.items():
        if not isinstance(value, Tensor):
            raise LoadError(f"input '{name}' is no tensor", hint="export with tensors only")
    names = _symbol_names(values)
    axes = {
        name: tuple(_entry(size, names) for size in value.shape) for name, value in values.items()
    }
    ranges = {names[symbol]: _range(exported, symbol) for symbol in names}
    sizes = {name: max(low, 2 + 1 * i) for i, (name, (low, _)) in enumerate(ranges.items())}
    example = {
        name: torch.zeros([int(evaluate(a, sizes)) for a in axes[name]], dtype=value.dtype)
        for name, value in values.items()
    }
    return Dims(example, axes, sizes, ranges), _output_names(exported)


def _symbol_names(values: dict[str, Any]) -> dict[sympy.Symbol, str]:
    names: dict[sympy.Symbol, str] = {}
    for value in values.values():
        for axis, size in enumerate(value.shape):
            if not isinstance(size, SymInt) or not isinstance(size.node.expr, sympy.Symbol):
                continue
            is_index = not value.is_floating_point() and value.dim() == 2
            wish = "batch" if axis == 0 else "seq" if axis == 1 and is_index else f"n{len(names)}"
            taken = wish in names.values()
            names.setdefault(size.node.expr, f"n{len(names)}" if taken else wish)
    return names


def _entry(size: Any, names: dict[sympy.Symbol, str]) -> str | int:
    if isinstance(size, int):
        return size
    renamed = size.node.expr.xreplace({s: sympy.Symbol(n) for s, n in names.items()})
    return int(renamed) if renamed.is_Integer else str(renamed)


def _range(exported: ExportedProgram, symbol: sympy.Symbol) -> tuple[int, int | None]:
    bounds = exported.range_constraints.get(symbol)
    low = int(bounds.lower) if bounds is not None and bounds.lower > 2 else 1
    high = int(bounds.upper) if bounds is not None and bounds.upper < 2**31 else None
    return low, high


def _output_names(exported: ExportedProgram) -> tuple[str, ...]:
    count = len(exported.graph_signature.user_outputs)
    spec: Any = exported.call_spec.out_spec
    if spec is not None and spec.type is dict and len(spec.context) == count:
        return tuple(map(str, spec.context))
    return tuple(f"output_{i}" for i in range(count))
