"""How to trace a model: its example inputs, the names of their axes, its state, how to call it.

What a model takes is read off its forward's signature and its configuration, never off a table
of class names.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from redpass.errors import TraceError
from redpass.frontend import causal
from redpass.frontend.dims import DimNames
from redpass.frontend.trace import Call, call_by_name

BATCH, SEQ = 2, 5


@dataclass(frozen=True)
class Adapted:
    """A module with all that `trace` needs to know about it."""

    module: nn.Module
    example: Mapping[str, Tensor]
    dims: DimNames
    task: str = "unknown"
    state: tuple[tuple[str, str], ...] = ()
    call: Call = call_by_name
    ranges: Mapping[str, tuple[int, int | None]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def parameters_of(module: nn.Module) -> list[str]:
    """Returns the names of the parameters of a module's forward."""
    return list(inspect.signature(module.forward).parameters)


def is_transformers(module: nn.Module) -> bool:
    """Whether `module` has the interface of a Hugging Face transformers model."""
    return hasattr(module, "main_input_name") and hasattr(
        getattr(module, "config", None), "get_text_config"
    )


def is_diffusers(module: nn.Module) -> bool:
    """Whether `module` has the interface of a diffusers model."""
    return (
        hasattr(module, "config_name")
        and hasattr(module, "config")
        and hasattr(module, "register_to_config")
    )


@contextlib.contextmanager
def plain_experts(module: Any) -> Iterator[None]:
    """Lets expert layers run as plain batched products, which every runtime has.

    The default groups tokens by expert with an op that neither ONNX nor most devices know. The
    module's own choice is restored afterwards.
    """
    if not getattr(module, "_can_set_experts_implementation", lambda: False)():
        yield
        return
    original = module.get_experts_implementation()
    module.set_experts_implementation("batched_mm")
    try:
        yield
    finally:
        module.set_experts_implementation(original)


def adapt_transformers(model: Any) -> Adapted:
    """Adapts a transformers model: a causal LM, an encoder, a classifier, an audio encoder.

    Raises:
        TraceError: the configuration does not say what the inputs look like.
    """
    if model.config.is_encoder_decoder:
        encoder = adapt_transformers_plain(model.get_encoder())
        note = "an encoder-decoder: only the encoder was taken"
        return Adapted(**{**vars(encoder), "notes": (*encoder.notes, note)})
    if causal.is_causal(model, parameters_of(model)):
        example, dims, state = causal.example(model, parameters_of(model))
        return Adapted(
            model,
            example,
            dims,
            "causal-lm",
            state,
            causal.call,
            {"batch": (1, None), "seq": (1, None), "past": (0, None)},
        )
    return adapt_transformers_plain(model)


def adapt_transformers_plain(model: Any) -> Adapted:
    """Adapts a transformers model without a cache."""
    names, main = parameters_of(model), model.main_input_name
    builders: dict[str, Callable[[Any, list[str]], tuple[dict[str, Tensor], DimNames]]] = {
        "input_ids": _text,
        "pixel_values": _image,
        "input_features": _features,
        "input_values": _wave,
    }
    main = next((name for name in (main, *builders) if name in names), main)
    if main not in builders:
        raise TraceError(
            f"cannot make an example for the input '{main}'",
            hint="give the inputs: --input 'name:dtype[sizes]'",
        )
    example, dims = builders[main](model, names)
    task = "classifier" if "labels" in names and _has_classes(model) else "encoder"
    return Adapted(model, _on_device(model, example), dims, task, call=call_plain)


def call_plain(model: nn.Module, values: Mapping[str, Tensor]) -> Any:
    """Calls a transformers or diffusers model by names, without a cache of its own."""
    names = parameters_of(model)
    fixed: dict[str, Any] = {}
    if "use_cache" in names or "past_key_values" in names:
        fixed["use_cache"] = False
    if "return_dict" in names or "kwargs" in names:
        fixed["return_dict"] = True
    return model(**values, **fixed)


def _has_classes(model: Any) -> bool:
    return type(model).__name__.endswith("Classification")


def _text(model: Any, names: list[str]) -> tuple[dict[str, Tensor], DimNames]:
    ids = torch.arange(BATCH * SEQ).view(BATCH, SEQ) % max(vocabulary(model.config), 1)
    example = {"input_ids": ids}
    if "attention_mask" in names:
        example["attention_mask"] = torch.ones_like(ids)
    kinds = getattr(model.config.get_text_config(), "type_vocab_size", 0) or 0
    if "token_type_ids" in names and kinds > 1:
        example["token_type_ids"] = torch.zeros_like(ids)
    return example, dict.fromkeys(example, ("batch", "seq"))


def vocabulary(config: Any) -> int:
    """Returns the vocabulary size a configuration states, or 1."""
    return int(getattr(config.get_text_config(), "vocab_size", 1) or 1)


def _image(model: Any, _names: list[str]) -> tuple[dict[str, Tensor], DimNames]:
    config = getattr(model.config, "vision_config", model.config)
    size = getattr(config, "image_size", None)
    if size is None:
        raise TraceError("the configuration states no image_size", hint=_GIVE_PIXELS)
    height, width = size if isinstance(size, list | tuple) else (size, size)
    channels = int(getattr(config, "num_channels", 3))
    fixed = (channels, int(height), int(width))
    return {"pixel_values": torch.randn(BATCH, *fixed)}, {"pixel_values": ("batch", *fixed)}


_GIVE_PIXELS = "give it: --input 'pixel_values:float32[batch,3,224,224]'"


def _features(model: Any, _names: list[str]) -> tuple[dict[str, Tensor], DimNames]:
    config = model.config
    bins = int(getattr(config, "num_mel_bins", 0) or getattr(config, "feature_size", 80))
    frames = 2 * int(getattr(config, "max_source_positions", 1500))
    shape = ("batch", bins, frames)
    return {"input_features": torch.randn(BATCH, bins, frames)}, {"input_features": shape}


def _wave(_model: Any, _names: list[str]) -> tuple[dict[str, Tensor], DimNames]:
    return {"input_values": torch.randn(BATCH, 16000)}, {"input_values": ("batch", 16000)}


def adapt_diffusers(model: Any) -> Adapted:
    """Adapts a diffusers denoiser from its configuration and its forward's parameters.

    Raises:
        TraceError: the configuration does not say what the inputs look like.
    """
    config, names = model.config, parameters_of(model)
    main = next((name for name in ("hidden_states", "sample") if name in names), None)
    size = config.get("sample_size")
    if main is None or size is None:
        raise TraceError(
            "the configuration does not say what the inputs look like",
            hint="give the inputs: --input 'name:dtype[sizes]'",
        )
    height, width = size if isinstance(size, list | tuple) else (size, size)
    channels = int(config["in_channels"])
    example: dict[str, Tensor] = {main: torch.randn(BATCH, channels, height, width)}
    dims: dict[str, tuple[str | int, ...]] = {main: ("batch", channels, height, width)}
    if "timestep" in names:
        example["timestep"], dims["timestep"] = torch.arange(1, BATCH + 1), ("batch",)
    width = config.get("cross_attention_dim") or config.get("caption_channels")
    if "encoder_hidden_states" in names and isinstance(width, int):
        example["encoder_hidden_states"] = torch.randn(BATCH, SEQ, width)
        dims["encoder_hidden_states"] = ("batch", "text", width)
    if "class_labels" in names and _takes_classes(config):
        example["class_labels"], dims["class_labels"] = torch.zeros(BATCH).long(), ("batch",)
    return Adapted(model, _on_device(model, example), dims, "denoiser")


def _takes_classes(config: Any) -> bool:
    return bool(config.get("class_embed_type") or config.get("num_class_embeds")) or (
        config.get("norm_type") in ("ada_norm_zero", "ada_norm")
    )


def _on_device(model: nn.Module, example: dict[str, Tensor]) -> dict[str, Tensor]:
    weight = next(model.parameters(), None)
    if weight is None:
        return example
    return {
        name: value.to(weight.device, weight.dtype if value.is_floating_point() else None)
        for name, value in example.items()
    }
