"""Hugging Face folders: `config.json` and safetensors, offline, without code from the folder."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from redpass.checks import folder as checks
from redpass.checks import safetensors, skeleton
from redpass.errors import LoadError


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
    folder = checks.model_folder(folder)
    config, notes = checks.read_config(folder / "config.json")
    checks.check_kind(config, folder)
    if not fake:
        checks.check_counts(config, len(safetensors.check_folder(folder)), folder)
    if "_class_name" in config:
        return Opened(_diffusers(folder, config, fake=fake), config, notes)
    return Opened(_transformers(folder, config, fake=fake), config, notes)


def _transformers(folder: Path, raw: Mapping[str, Any], *, fake: bool) -> Any:
    _need("transformers")
    from transformers import CONFIG_MAPPING

    file = folder / "config.json"
    kind = str(raw["model_type"])
    if kind not in CONFIG_MAPPING:
        raise checks.unknown_kind(kind, folder)
    try:
        config = CONFIG_MAPPING[kind].from_dict(dict(raw))
    except Exception as error:
        raise skeleton.refused_config(error, folder) from error
    kind_of_model = _model_class(raw, config, file)
    with quiet():
        module = _build(kind_of_model, config, folder, raw, fake=fake)
    return module.eval()


def _model_class(raw: Mapping[str, Any], config: Any, file: Path) -> Any:
    """Returns the transformers class `architectures` names, or the base model of the type."""
    import transformers

    for name in _listed(raw.get("architectures")):
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


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


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
            ignore_mismatched_sizes=True,  # they are refused below, by name
            **how,
        )

    try:
        module, report = _with_attention(read)
        if skeleton.only_pooler(report["missing_keys"]):
            module, report = _with_attention(lambda how: read({**how, "add_pooling_layer": False}))
    except LoadError:
        raise
    except Exception as error:
        raise skeleton.refused_model(error, folder) from error
    skeleton.refuse(report, folder)  # else transformers would have filled in random numbers
    return module


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
        found = f"diffusers cannot load it: {skeleton.short(error)}"
        raise LoadError(found, file=folder) from error


def _need(package: str) -> None:
    try:
        __import__(package)
    except ImportError as error:
        raise LoadError(
            f"this folder needs {package}, which is not installed",
            hint=f"pip install {'redpass[hf]' if package == 'transformers' else package}",
        ) from error


@contextmanager
def quiet() -> Iterator[None]:
    """Keeps the libraries' reports and bars off the terminal; errors still raise.

    Their settings are the caller's again afterwards.
    """
    with ExitStack() as stack, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for package in ("transformers", "diffusers"):
            if package in sys.modules:
                stack.enter_context(_silenced(import_module(f"{package}.utils.logging")))
        yield


@contextmanager
def _silenced(log: Any) -> Iterator[None]:
    """Keeps one library silent; `log` is its module of settings."""
    hub: Any = import_module("huggingface_hub.utils")
    level, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    hidden = hub.are_progress_bars_disabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(level)
        if bars:
            log.enable_progress_bar()
        # transformers' switch turns the hub's bars, too, which have a switch of their own.
        if hub.are_progress_bars_disabled() != hidden:
            (hub.disable_progress_bars if hidden else hub.enable_progress_bars)()
