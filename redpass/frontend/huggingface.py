"""Hugging Face folders: `config.json` and safetensors, offline, without code from the folder."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from redpass.errors import LoadError
from redpass.frontend import safetensors_check

FLOATS = ("Infinity", "-Infinity", "NaN")
"""What transformers writes as `{"__float__": "Infinity"}`, because JSON has no word for it."""

CODE_KEYS = frozenset({"auto_map", "custom_pipelines", "custom_generate", "trust_remote_code"})
"""Keys of a configuration that name code to run."""

CHOICE_KEYS = frozenset({"attn_implementation", "experts_implementation"})
"""Keys that choose an implementation, which may be one from the network."""

MAX_CONFIG = 16 << 20


@dataclass(frozen=True)
class Opened:
    """A model built from a folder: the module, its configuration as stored, and notes."""

    module: Any
    config: Mapping[str, Any]
    notes: tuple[str, ...] = ()


def open_folder(folder: Path, *, fake: bool = False) -> Opened:
    """Builds the model a folder describes and reads its weights.

    Args:
        folder: holds `config.json` and `*.safetensors`, or is a diffusers pipeline.
        fake: build on the meta device and read no weights (none need be there).

    Raises:
        LoadError: no or bad configuration, damaged or missing weights, an unknown architecture,
            or a model that needs code from the folder.
    """
    folder = _model_folder(folder)
    config, notes = read_config(folder / "config.json")
    if not fake:
        safetensors_check.check_folder(folder)
    if "_class_name" in config:
        return Opened(_diffusers(folder, config, fake=fake), config, notes)
    if "model_type" not in config:
        raise LoadError(
            "the configuration names neither 'model_type' nor '_class_name'",
            file=folder / "config.json",
            hint="give a folder saved by save_pretrained of transformers or diffusers",
        )
    return Opened(_transformers(folder, config, fake=fake), config, notes)


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
    if not path.is_file():
        raise LoadError("no such file", file=path, hint="a Hugging Face folder holds config.json")
    if path.stat().st_size > MAX_CONFIG:
        raise LoadError(f"larger than {MAX_CONFIG} bytes", file=path)
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise LoadError(f"not JSON: {error}", file=path, hint="fetch the file again") from error
    if not isinstance(value, dict):
        raise LoadError("not a JSON object", file=path)
    return value


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
        elif key in CHOICE_KEYS or (key.startswith("_") and key != "_class_name"):
            continue
        else:
            kept[key] = _clean(part, removed)
    return kept


def _model_folder(folder: Path) -> Path:
    """Returns the folder of the denoiser in a diffusers pipeline, else `folder`."""
    if (folder / "config.json").is_file() or not (folder / "model_index.json").is_file():
        return folder
    for part in ("transformer", "unet"):
        if (folder / part / "config.json").is_file():
            return folder / part
    raise LoadError("a pipeline without 'transformer' or 'unet'", file=folder)


def _transformers(folder: Path, raw: Mapping[str, Any], *, fake: bool) -> Any:
    _need("transformers")
    from transformers import CONFIG_MAPPING

    file = folder / "config.json"
    kind = str(raw["model_type"])
    if kind not in CONFIG_MAPPING:
        raise LoadError(
            f"model_type '{kind}' is not one transformers knows",
            file=file,
            hint="redpass runs no code from a folder; build the module yourself and pass it",
        )
    if "quantization_config" in raw:
        raise LoadError("quantised weights are not supported", file=file)
    try:
        config = CONFIG_MAPPING[kind].from_dict(dict(raw))
    except Exception as error:
        raise LoadError(f"the configuration is refused: {error}", file=file) from error
    kind_of_model = _model_class(raw, config, file)
    with quiet():
        module = _build(kind_of_model, config, folder, raw, fake=fake)
    return module.eval()


def _model_class(raw: Mapping[str, Any], config: Any, file: Path) -> Any:
    """Returns the transformers class `architectures` names, or the base model of the type."""
    import transformers

    for name in raw.get("architectures") or ():
        found = getattr(transformers, str(name), None)
        if (
            isinstance(found, type)
            and issubclass(found, transformers.PreTrainedModel)
            and found.config_class is not None
            and isinstance(config, found.config_class)
        ):
            return found
    if type(config) in transformers.MODEL_MAPPING:
        return transformers.MODEL_MAPPING[type(config)]
    raise LoadError(f"no model class for '{raw['model_type']}'", file=file, place="architectures")


def _build(kind: Any, config: Any, folder: Path, raw: Mapping[str, Any], *, fake: bool) -> Any:
    dtype = _dtype(raw)
    if fake:
        with torch.device("meta"):
            return _with_attention(lambda how: kind._from_config(config, dtype=dtype, **how))

    def read(how: dict[str, Any]) -> Any:
        return kind.from_pretrained(
            str(folder),
            config=config,
            dtype=dtype,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
            **how,
        )

    try:
        module, report = _with_attention(read)
        if _only_pooler(report["missing_keys"]):
            module, report = _with_attention(lambda how: read({**how, "add_pooling_layer": False}))
    except LoadError:
        raise
    except Exception as error:
        raise LoadError(
            f"transformers cannot load the weights: {_short(error)}",
            file=folder,
            hint="the weights and config.json must belong together",
        ) from error
    missing = sorted(report["missing_keys"])
    if missing:
        raise LoadError(
            f"{len(missing)} weights are missing: {', '.join(missing[:5])}",
            file=folder,
            hint="the weights and config.json must belong together",
        )
    return module


def _only_pooler(missing: Any) -> bool:
    return bool(missing) and all("pooler." in name for name in missing)


def _with_attention(build: Any) -> Any:
    """Builds with fused attention, or as the model comes when it has none."""
    try:
        return build({"attn_implementation": "sdpa"})
    except (ValueError, ImportError) as error:
        if "attention implementation" not in str(error) and "attn_implementation" not in str(error):
            raise
        return build({"attn_implementation": "eager"})


def _dtype(raw: Mapping[str, Any]) -> torch.dtype:
    name = str(raw.get("dtype") or raw.get("torch_dtype") or "float32")
    found = getattr(torch, name.removeprefix("torch."), None)
    return found if isinstance(found, torch.dtype) else torch.float32


def _diffusers(folder: Path, raw: Mapping[str, Any], *, fake: bool) -> Any:
    _need("diffusers")
    import diffusers

    file, name = folder / "config.json", str(raw["_class_name"])
    kind: Any = getattr(diffusers, name, None)
    if not (isinstance(kind, type) and issubclass(kind, diffusers.ModelMixin)):
        raise LoadError(f"'{name}' is no diffusers model", file=file, place="_class_name")
    try:
        with quiet():
            if fake:
                with torch.device("meta"):
                    return kind.from_config(dict(raw)).eval()
            return kind.from_pretrained(
                str(folder), local_files_only=True, use_safetensors=True
            ).eval()
    except Exception as error:
        raise LoadError(f"diffusers cannot load it: {_short(error)}", file=folder) from error


def _need(package: str) -> None:
    try:
        __import__(package)
    except ImportError as error:
        raise LoadError(
            f"this folder needs {package}, which is not installed",
            hint=f"pip install {'redpass[hf]' if package == 'transformers' else package}",
        ) from error


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:500]


@contextmanager
def quiet() -> Iterator[None]:
    """Keeps the libraries' load reports and bars off the terminal; errors still raise."""
    import transformers.utils.logging as log

    level, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.set_verbosity(level)
        if bars:
            log.enable_progress_bar()
