"""Data files to batches: arrays, tensors, lines of text, JSON lines."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from redpass.checks import memory, safetensors
from redpass.data import LABELS, Batches
from redpass.errors import DataError, LoadError, RedpassError, UsageError
from redpass.frontend import pickled
from redpass.frontend.dims import evaluate
from redpass.frontend.indices import check_index
from redpass.frontend.tokenizer import open_tokenizer, tokens
from redpass.program import Port, Program, check_port

TENSORS = (".npz", ".safetensors", ".pt")
TEXT = (".txt", ".text", ".jsonl")


def read_batches(
    path: str | Path,
    program: Program,
    *,
    batch_size: int = 8,
    tokenizer: Any = None,
    length: int = 128,
    limit: int | None = None,
) -> Batches:
    """Reads a data file as batches of the program's inputs.

    Args:
        path: `.npz`, `.safetensors` or `.pt` with one array an input, rows first; or text, one
            row a line; or `.jsonl` with `text` and perhaps `label`.
        batch_size: rows a batch; the last may have fewer.
        tokenizer: a tokenizer, or the folder of one; for text, the program's own by default.
        length: tokens a row of text is cut to.
        limit: rows to read at most.

    Raises:
        DataError: missing, empty, damaged, or not what the program takes.
        UsageError: text without a tokenizer.
    """
    file = Path(path)
    if tokenizer is None and program.origin.kind == "huggingface":
        tokenizer = program.origin.path
    if file.suffix in TENSORS:
        tables = [read_rows(file, tokenizer=tokenizer, limit=limit)]
        parts = _slices(tables[0], batch_size)
        known = {port.name for port in program.signature.inputs} | {LABELS}
        _check_names(tables[0], known, file)
    else:
        lines = read_lines(file, limit)
        encode = open_tokenizer(tokenizer)
        known = {port.name for port in program.signature.inputs} | {LABELS}
        parts = (
            {k: v for k, v in _encode(encode, chunk, length).items() if k in known}
            for chunk in _chunks(lines, batch_size)
        )
    items = []
    for part in parts:
        try:
            items.append(complete_inputs(program, part))
        except DataError as error:
            raise DataError(error.found, file=file, place=error.place, hint=error.hint) from error
    return Batches(tuple(items), str(file))


def complete_inputs(program: Program, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Fills in the inputs that follow from the others, and checks all.

    Masks become ones, positions count the mask's tokens, the cache is empty, token types are
    zero. Integers and floats are cast to the port's width, never one to the other.

    Raises:
        DataError: an input that nothing gives, or of the wrong dtype, rank or size.
    """
    sizes = _sizes(program, batch)
    result = {name: value for name, value in batch.items() if name == LABELS}
    for port in program.signature.inputs:
        value = batch[port.name] if port.name in batch else _default(port, program, sizes, result)
        try:
            value = _cast(value, port)
            check_port(port, value)
        except UsageError as error:
            raise DataError(error.found, place=error.place, hint=_advice(port, value)) from error
        if port.name in batch:
            check_index(program, port.name, value)
        result[port.name] = value
    return result


def _advice(port: Port, value: Tensor) -> str:
    if value.dim() and len(port.shape) == value.dim() and port.shape[0] != value.shape[0]:
        first = port.shape[0]
        if isinstance(first, int) and port.shape[1:] == tuple(value.shape[1:]):
            return f"this model takes {first} rows at a time: --batch-size {first}"
    return "give rows of that dtype and those sizes, each column under the name of its input"


def _sizes(program: Program, batch: Mapping[str, Tensor]) -> dict[str, int]:
    """Reads the sizes of dimensions off the given inputs; a past nobody gives is empty."""
    sizes: dict[str, int] = {}
    for port in program.signature.inputs:
        if port.name in batch and batch[port.name].dim() == len(port.shape):
            for entry, size in zip(port.shape, batch[port.name].shape, strict=True):
                if isinstance(entry, str) and entry.isidentifier():
                    sizes.setdefault(entry, size)
    sizes.setdefault("past", 0)
    return sizes


def _default(
    port: Port, program: Program, sizes: Mapping[str, int], known: Mapping[str, Tensor]
) -> Tensor:
    states = {source for source, _ in program.signature.state}
    try:
        shape = [int(evaluate(entry, sizes)) for entry in port.shape]
    except UsageError as error:
        raise DataError(
            f"the data has no '{port.name}'", place=f"input '{port.name}'", hint=f"expected {port}"
        ) from error
    if port.name in states or port.name == "token_type_ids":
        return torch.zeros(shape, dtype=port.dtype)
    if port.name == "attention_mask":
        return torch.ones(shape, dtype=port.dtype)
    if port.name == "position_ids":
        mask = known.get("attention_mask")
        if mask is None:
            positions = torch.arange(sizes["past"], sizes["past"] + shape[-1])
            return positions.expand(shape).contiguous().to(port.dtype)
        return (mask.cumsum(-1) - 1).clamp(min=0)[:, -shape[-1] :].to(port.dtype).contiguous()
    raise DataError(
        f"the data has no '{port.name}'", place=f"input '{port.name}'", hint=f"expected {port}"
    )


def _cast(value: Tensor, port: Port) -> Tensor:
    is_whole = not value.is_floating_point() and not value.is_complex()
    wants_whole = not port.dtype.is_floating_point and not port.dtype.is_complex
    return value.to(port.dtype) if is_whole == wants_whole else value


def read_rows(path: Path, *, tokenizer: Any = None, limit: int | None = None) -> dict[str, Tensor]:
    """Reads a data file as one table: name -> tensor with rows first.

    Raises:
        DataError: missing, empty, damaged, or columns of different lengths.
    """
    _check_file(path)
    if path.suffix not in TENSORS:
        return _encode(open_tokenizer(tokenizer), read_lines(path, limit), 128)
    try:
        table = _tensors(path)
    except DataError:
        raise
    except RedpassError as error:
        raise DataError(error.found, file=path, place=error.place, hint=error.hint) from error
    except Exception as error:
        hint = "write the file again"
        raise DataError(f"cannot be read: {error}", file=path, hint=hint) from error
    lengths = {name: len(value) if value.dim() else 0 for name, value in table.items()}
    if not table or not all(lengths.values()):
        raise DataError("no rows", file=path, hint="give at least one row of data")
    if len(set(lengths.values())) > 1:
        hint = "one row of every input belongs together"
        raise DataError(f"columns of different lengths: {lengths}", file=path, hint=hint)
    return {name: value[:limit] for name, value in table.items()}


def _check_file(path: Path) -> None:
    if not path.is_file():
        raise DataError("no such file", file=path, hint=f"give {', '.join(TENSORS + TEXT)}")
    if not path.stat().st_size:
        raise DataError("no rows: the file is empty", file=path, hint="give at least one row")


def _tensors(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".npz":
        memory.check_unpacked(path)
        with np.load(path, allow_pickle=False) as arrays:
            return {name: torch.from_numpy(np.array(arrays[name])) for name in arrays.files}
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        safetensors.check_file(path)
        return dict(load_file(path))
    loaded = pickled.load_pickled(path)
    if not isinstance(loaded, Mapping) or not all(map(torch.is_tensor, loaded.values())):
        raise LoadError("holds no table of tensors", file=path, hint="save {'name': tensor}")
    return dict(loaded)


def read_lines(path: Path, limit: int | None) -> list[dict[str, Any]]:
    """Reads rows with `text` and perhaps `label` from lines of text or JSON.

    Raises:
        DataError: missing, empty, not UTF-8, or a line without `text`; it names the line.
    """
    _check_file(path)
    rows: list[dict[str, Any]] = []
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line.strip() and (limit is None or len(rows) < limit):
                    rows.append(_row(line, number, path))
    except UnicodeDecodeError as error:
        hint = "save it as UTF-8"
        raise DataError(f"no UTF-8 text: {error.reason}", file=path, hint=hint) from error
    if not rows:
        raise DataError("no rows: only empty lines", file=path, hint="give at least one row")
    return rows


def _row(line: str, number: int, path: Path) -> dict[str, Any]:
    if path.suffix != ".jsonl":
        return {"text": line.rstrip("\n")}
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        hint = "one JSON object a line"
        raise DataError(
            f"not JSON: {error}", file=path, place=f"line {number}", hint=hint
        ) from error
    if not isinstance(row, dict) or not isinstance(row.get("text"), str):
        hint = 'each line is an object with "text"'
        raise DataError("no 'text'", file=path, place=f"line {number}", hint=hint)
    return row


def _encode(tokenizer: Any, rows: list[dict[str, Any]], length: int) -> dict[str, Tensor]:
    encoded = tokens(tokenizer, [row["text"] for row in rows], length)
    pad = getattr(tokenizer, "pad_token_id", None)
    pad = (getattr(tokenizer, "eos_token_id", None) or 0) if pad is None else pad
    width = max(1, *map(len, encoded)) if encoded else 1
    ids = torch.full((len(encoded), width), int(pad), dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for position, row in enumerate(encoded):
        ids[position, : len(row)] = torch.tensor(row, dtype=torch.int64)
        mask[position, : len(row)] = 1
    batch = {"input_ids": ids, "attention_mask": mask}
    labels = [row.get("label") for row in rows]
    if all(isinstance(label, int) and abs(label) < 2**63 for label in labels):
        batch[LABELS] = torch.tensor(labels)
    return batch


def _check_names(table: Mapping[str, Tensor], known: set[str], file: Path) -> None:
    wrong = sorted(set(table) - known)
    if wrong:
        raise DataError(
            f"unknown column '{wrong[0]}'",
            file=file,
            hint=f"the program takes {', '.join(sorted(known - {LABELS}))}",
        )


def _slices(table: Mapping[str, Tensor], size: int) -> Iterator[dict[str, Tensor]]:
    rows = len(next(iter(table.values())))
    for start in range(0, rows, size):
        yield {name: value[start : start + size] for name, value in table.items()}


def _chunks(rows: list[dict[str, Any]], size: int) -> Iterator[list[dict[str, Any]]]:
    for start in range(0, len(rows), size):
        yield rows[start : start + size]
