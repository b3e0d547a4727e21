"""Causal language models: one graph with the KV cache as explicit inputs and outputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from redpass.errors import TraceError
from redpass.frontend.dims import DimNames

BATCH, SEQ, PAST = 2, 5, 3


def is_causal(model: Any, names: Sequence[str]) -> bool:
    """Whether a transformers model generates and its forward takes a cache."""
    return hasattr(model, "generate") and "past_key_values" in names and "input_ids" in names


def key_name(layer: int, part: str, *, past: bool) -> str:
    """Returns the port name of a layer's cache entry; `part` is `key` or `value`."""
    return f"{'past_key_values' if past else 'present'}.{layer}.{part}"


def example(
    model: Any, names: Sequence[str]
) -> tuple[dict[str, Tensor], DimNames, tuple[tuple[str, str], ...]]:
    """Returns example inputs, the names of their axes, and the state pairs of a causal LM.

    Which layers keep what comes from one run on two tokens.

    Raises:
        TraceError: a layer keeps something else than keys and values.
    """
    device = next(model.parameters()).device
    cache = _probe(model, device)
    ids = torch.arange(BATCH * SEQ, device=device).view(BATCH, SEQ) % _rows(model)
    values: dict[str, Tensor] = {
        "input_ids": ids,
        "attention_mask": torch.ones(BATCH, PAST + SEQ, dtype=torch.int64, device=device),
    }
    dims: dict[str, tuple[str | int, ...]] = {
        "input_ids": ("batch", "seq"),
        "attention_mask": ("batch", "past + seq"),
    }
    if "position_ids" in names:
        positions = torch.arange(PAST, PAST + SEQ, device=device)
        values["position_ids"] = positions.expand(BATCH, SEQ).contiguous()
        dims["position_ids"] = ("batch", "seq")
    pairs = []
    for layer, entries in enumerate(cache):
        for part, tensor in zip(("key", "value"), entries, strict=True):
            name = key_name(layer, part, past=True)
            heads, width = int(tensor.shape[1]), int(tensor.shape[3])
            values[name] = torch.zeros(BATCH, heads, PAST, width, dtype=tensor.dtype, device=device)
            dims[name] = ("batch", heads, "past", width)
            pairs.append((name, key_name(layer, part, past=False)))
    return values, dims, tuple(pairs)


def call(model: nn.Module, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Calls a causal LM with its cache given as flat tensors.

    Every layer gets a cache that keeps all positions, sliding-window layers too: their window is
    in the mask, so one graph is right for every past length.
    """
    layers = sum(name.startswith("past_key_values.") for name in values) // 2
    cache = filled_cache(
        [
            (values[key_name(i, "key", past=True)], values[key_name(i, "value", past=True)])
            for i in range(layers)
        ]
    )
    plain = {k: v for k, v in values.items() if not k.startswith("past_key_values.")}
    result = model(**plain, past_key_values=cache, use_cache=True, return_dict=True)
    outputs = {"logits": result.logits}
    for index, layer in enumerate(cache.layers):
        outputs[key_name(index, "key", past=False)] = layer.keys
        outputs[key_name(index, "value", past=False)] = layer.values
    return outputs


def filled_cache(entries: Sequence[tuple[Tensor, Tensor]]) -> Any:
    """Returns a transformers cache that holds `entries`, without a copy.

    The layers are filled directly: an update of an empty cache would leave a concatenation with
    an empty tensor in the graph.
    """
    from transformers.cache_utils import DynamicCache, DynamicLayer

    cache: Any = DynamicCache()
    for keys, values in entries:
        layer: Any = DynamicLayer()
        layer.keys, layer.values = keys, values
        layer.dtype, layer.device, layer.is_initialized = keys.dtype, keys.device, True
        cache.layers.append(layer)
    return cache


def _rows(model: Any) -> int:
    return max(int(getattr(model.config.get_text_config(), "vocab_size", 1) or 1), 1)


def _probe(model: Any, device: torch.device) -> list[tuple[Tensor, Tensor]]:
    from transformers.cache_utils import DynamicCache

    cache: Any = DynamicCache()
    ids = torch.zeros(1, 2, dtype=torch.int64, device=device)
    with torch.no_grad():
        model(input_ids=ids, past_key_values=cache, use_cache=True, return_dict=True)
    entries = []
    for index, layer in enumerate(cache.layers):
        keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
        if keys is None or values is None or keys.dim() != 4:
            raise TraceError(
                f"layer {index} keeps a {type(layer).__name__}, not keys and values",
                hint="only caches of keys and values can be made explicit",
            )
        entries.append((keys, values))
    if not entries:
        raise TraceError("the model did not write to its cache")
    return entries
