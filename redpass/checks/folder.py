"""Hugging Face folders: `config.json` as data, without the keys that name code."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from redpass.checks import archive, safetensors, skeleton
from redpass.errors import LoadError

CODE_KEYS = frozenset({"auto_map", "custom_pipelines", "custom_generate", "trust_remote_code"})
"""Keys of a configuration that name code to run."""

CHOICE_KEYS = frozenset({"attn_implementation", "experts_implementation"})
"""Keys that choose an implementation, which may be one from the network."""

FLOATS = ("Infinity", "-Infinity", "NaN")
"""What transformers writes as `{"__float__": "Infinity"}`, because JSON has no word for it."""

COUNTS = re.compile(r"layer|block|depth|stage|expert|head|codebook|group")
FREE = 4096
"""A key that may count parts of a model; a count up to this builds in moments anyway."""

MAX_CONFIG = 16 << 20
MAX_PARTS = 500_000
KNOWN = "give a folder saved by save_pretrained of transformers or diffusers"


def check(folder: Path) -> None:
    """Checks a model folder: its configuration, its weights, and that they belong together.

    Raises:
        LoadError: see `read_config`, `safetensors.check_folder` and `skeleton.check`.
    """
    folder = model_folder(folder)
    config, _ = read_config(folder / "config.json")
    check_kind(config, folder)
    _check_mentioned(config, folder)
    tensors = safetensors.check_folder(folder)
    check_counts(config, len(tensors), folder)
    if "_class_name" not in config:
        skeleton.check(config, tensors, folder)


def check_kind(config: dict[str, Any], folder: Path) -> None:
    """Raises `LoadError` when a configuration does not say what it is of."""
    file = folder / "config.json"
    if "_class_name" not in config and "model_type" not in config:
        found = "the configuration names neither 'model_type' nor '_class_name'"
        raise LoadError(found, file=file, hint=KNOWN)
    for key in ("_class_name", "model_type"):
        if not isinstance(config.get(key, ""), str):
            raise LoadError("is not text", file=file, place=key, hint=KNOWN)
    if "quantization_config" in config:
        hint = "give the model in float32, float16 or bfloat16"
        raise LoadError("quantised weights are not supported", file=file, hint=hint)


def check_counts(config: dict[str, Any], tensors: int, folder: Path) -> None:
    """Refuses a configuration that asks for far more parts than the weights have tensors.

    A model is built before its weights are compared, and a billion layers are never built.
    """
    for key, value in _numbers(config):
        if COUNTS.search(key) and value > max(FREE, tensors) and not is_size(key):
            raise LoadError(
                f"{value} parts for {tensors} tensors",
                file=folder / "config.json",
                place=key,
                hint=skeleton.HINT,
            )


def is_size(key: str) -> bool:
    """Whether a key gives the size of something, or how far something goes, not how many parts."""
    return bool(re.search(r"size|dim|length|position|embed|token|vocab|ctx|channel|feature", key))


def _numbers(value: Any, name: str = "") -> Iterator[tuple[str, int]]:
    if isinstance(value, dict):
        for key, part in value.items():
            yield from _numbers(part, key)
    elif isinstance(value, list):
        for part in value:
            yield from _numbers(part, name)
    elif type(value) is int:
        yield name, value


def _check_mentioned(config: dict[str, Any], folder: Path) -> None:
    """Refuses a model type that transformers does not mention, without importing transformers."""
    kind, found = config.get("model_type"), importlib.util.find_spec("transformers")
    if kind is None or "_class_name" in config or found is None or found.origin is None:
        return
    tables = list((Path(found.origin).parent / "models" / "auto").glob("*.py"))
    if tables and not any(f'"{kind}"'.encode() in table.read_bytes() for table in tables):
        raise unknown_kind(kind, folder)


def unknown_kind(kind: str, folder: Path) -> LoadError:
    """Returns the error for a model type that transformers does not have."""
    return LoadError(
        f"model_type '{kind}' is not one transformers knows",
        file=folder / "config.json",
        hint="redpass runs no code from a folder; build the module yourself and pass it",
    )


def read_config(path: Path) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Reads a configuration and takes out what names code. Returns it with notes on that.

    Raises:
        LoadError: missing, too large, or not a JSON object.
    """
    config = read_json(path)
    removed: list[str] = []
    cleaned = _clean(config, removed)
    notes = (f"ignored in config.json: {', '.join(sorted(set(removed)))}",) if removed else ()
    return cleaned, notes


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object of bounded size. Raises `LoadError`."""
    if archive.file_size(path, "a Hugging Face folder holds config.json") > MAX_CONFIG:
        hint = "fetch the file again"
        raise LoadError(f"larger than {MAX_CONFIG} bytes", file=path, hint=hint)
    try:
        value = parse(path.read_bytes())
    except OSError as error:
        hint = "check its permissions"
        raise LoadError(f"cannot be read: {error.strerror}", file=path, hint=hint) from error
    except (ValueError, RecursionError) as error:
        raise LoadError(f"not JSON: {error}", file=path, hint="fetch the file again") from error
    if not isinstance(value, dict):
        raise LoadError("not a JSON object", file=path, hint="fetch the file again")
    return value


def parse(data: bytes) -> Any:
    """Parses JSON of bounded size, each key once.

    Raises:
        ValueError, RecursionError: it is not that.
    """
    if data.startswith(b"version https://git-lfs"):
        raise ValueError("a git-lfs pointer; run `git lfs pull`")
    if data.count(b",") + data.count(b"[") + data.count(b"{") > MAX_PARTS:
        raise ValueError("too many values")
    return json.loads(data.decode("utf-8"))


def _clean(value: Any, removed: list[str]) -> Any:
    if isinstance(value, list):
        return [_clean(part, removed) for part in value]
    if not isinstance(value, dict):
        return value
    if value.keys() == {"__float__"} and value["__float__"] in FLOATS:
        return float(value["__float__"])
    kept = {}
    for key, part in value.items():
        if key in CODE_KEYS:
            removed.append(key)
        elif key in CHOICE_KEYS or (
            key.startswith("_") and key not in ("_class_name", "__float__")
        ):
            continue
        else:
            kept[key] = _clean(part, removed)
    return kept


def model_folder(folder: Path) -> Path:
    """Returns the folder of the denoiser in a diffusers pipeline, else `folder`."""
    if (folder / "config.json").is_file() or not (folder / "model_index.json").is_file():
        return folder
    for part in ("transformer", "unet"):
        if (folder / part / "config.json").is_file():
            return folder / part
    hint = "give the folder of the model itself"
    raise LoadError("a pipeline without 'transformer' or 'unet'", file=folder, hint=hint)
