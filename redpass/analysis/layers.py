"""Layers: the repeating groups of branches, and which are equal up to weights."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from redpass import ops
from redpass.analysis.branches import Region
from redpass.analysis.flow import Flow

CHANNEL_MIXERS = ("feed-forward", "experts")


def layer_indices(kinds: Sequence[str], groups: Sequence[int], codes: Sequence[str]) -> list[int]:
    """Returns the layer (counted from 0) of each branch of one stream.

    Args:
        kinds: the branches' kinds, in order.
        groups: an integer a branch; branches of one sum (parallel ones) share it.
        codes: the branches' `fingerprint`s.
    """
    letters = ["C" if kind in CHANNEL_MIXERS else "T" for kind in kinds]
    period = _period(letters, groups)
    if period:
        return [place // period for place in range(len(letters))]
    layer, layers = 0, [0]
    for i in range(1, len(letters)):
        seen = [codes[j] for j in range(i) if layers[j] == layer]
        turn = letters[i - 1] == "C" and letters[i] == "T"
        again = codes[i] in seen or (letters[i] == "C" and letters[i - 1] == "C")
        layer += groups[i] != groups[i - 1] and (turn or again)
        layers.append(layer)
    return layers


def _period(letters: Sequence[str], groups: Sequence[int]) -> int:
    """The smallest period of `letters` that ends in a channel mixer if there are any, or 0."""
    total = len(letters)
    for period in range(1, total + 1):
        if total % period or (period == total and "".join(letters).count("CT")):
            continue
        if any(letters[i] != letters[i % period] for i in range(total)):
            continue
        cut = any(groups[i] == groups[i - 1] for i in range(period, total, period))
        if not cut:
            return period
    return 0


def fingerprint(flow: Flow, region: Region) -> str:
    """A digest of a branch's graph that equal branches share.

    Weights count by shape, floating-point constants not at all, values from outside the branch
    by dtype and shape, the stream by nothing.
    """
    codes: dict[fx.Node, str] = {}
    stream = region.skip.entry
    for node in sorted(region.path, key=flow.order.__getitem__):
        if flow.peel(node) is flow.peel(stream):
            codes[node] = f"stream {flow.shape(node)}"
            continue
        if flow.is_no_op(node) and not ops.is_view(node) and node.all_input_nodes[0] in codes:
            codes[node] = codes[node.all_input_nodes[0]]
            continue
        parts = [str(node.target), *(_code(flow, codes, stream, a) for a in node.args)]
        parts += [f"{k}={_code(flow, codes, stream, v)}" for k, v in node.kwargs.items()]
        codes[node] = hashlib.md5("|".join(parts).encode()).hexdigest()
    distinct = {code for code in codes.values() if not code.startswith("stream")}
    whole = f"{codes[region.term.node]} {len(distinct)} {region.form}"
    return hashlib.md5(whole.encode()).hexdigest()


def _code(flow: Flow, codes: dict[fx.Node, str], stream: fx.Node, value: Any) -> str:
    if isinstance(value, fx.Node):
        if value in codes:
            return codes[value]
        if value is stream:
            return f"stream {flow.shape(value)}"
        if ops.is_size(value):
            return "size"
        found = value.meta.get("val")
        dtype = found.dtype if isinstance(found, torch.Tensor) else ""
        kind = "value" if value in flow.live else "weight"
        return f"{kind} {dtype} {flow.shape(value)}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(_code(flow, codes, stream, v) for v in value) + "]"
    return "float" if isinstance(value, float) else str(value)
