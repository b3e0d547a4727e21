"""The references against loops written from the definitions."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from redpass.codegen.ops import OPS
from redpass.codegen.ops.activation import ACTIVATIONS
from tests.codegen.ops.cases import cases

DOUBLE = cases(torch.float64)


def close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)


def attend(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float | None) -> Tensor:
    """One head: q [s, d], k [t, d], v [t, e], seen [s, t]."""
    scores = q @ k.T * (scale or 1 / math.sqrt(len(q[0])))
    weights = torch.where(seen, scores.exp(), 0.0)
    return weights / weights.sum(1, keepdim=True).clamp_min(1e-300) @ v


@pytest.mark.parametrize(
    "label", ["clustered_attention", "clustered_attention causal", "clustered_attention mask"]
)
def test_clustered_attention(label) -> None:
    name, arguments = DOUBLE[label]
    q, k, v, clusters, keys, values, mask, causal, offset, scale = arguments
    found = OPS[name].reference(*arguments)
    for b in range(len(q)):
        for h, c in enumerate(clusters):
            seen = torch.ones(3, 7, dtype=torch.bool) if mask is None else mask[b, 0].clone()
            for i, j in ((i, j) for i in range(3) for j in range(7)):
                seen[i, j] &= not causal or j <= i + offset
            key, value = keys[c] if keys else c, values[h] if values else h
            close(found[b, h], attend(q[b, c], k[b, key], v[b, value], seen, scale))


def rotated(x: Tensor, cos: Tensor, sin: Tensor, pairs: list[tuple[int, int]]) -> Tensor:
    out = x.clone()
    for i, (one, two) in enumerate(pairs):
        out[..., one] = x[..., one] * cos[..., i] - x[..., two] * sin[..., i]
        out[..., two] = x[..., two] * cos[..., i] + x[..., one] * sin[..., i]
    return out


def pairs_of(width: int, interleaved: bool) -> list[tuple[int, int]]:
    half = width // 2
    return [(2 * i, 2 * i + 1) if interleaved else (i, i + half) for i in range(half)]


@pytest.mark.parametrize("label", ["latent_attention", "latent_attention pairs",
                                   "latent_attention normed"])  # fmt: skip
def test_latent_attention(label) -> None:
    name, arguments = DOUBLE[label]
    q, latent, up, values, raised, cos, sin, mask, interleaved, scale, *norm = arguments
    found = OPS[name].reference(*arguments)
    for b, h in ((b, h) for b in range(2) for h in range(8)):
        key = latent[b, :, h // 4] @ up[h // 2].T
        if norm:
            key = key / (key.square().mean(1, keepdim=True) + norm[1]).sqrt() * norm[0]
        key = rotated(key, cos[0], sin[0], pairs_of(16, interleaved))
        value = values[b, :, h // 4]
        value = value if raised is None else value @ raised[h // 4].T
        seen = torch.ones(q.shape[2], 7, dtype=torch.bool) if mask is None else mask[b, 0]
        close(found[b, h], attend(q[b, h], key, value, seen, scale))


@pytest.mark.parametrize("label", ["rotary halves", "rotary pairs"])
def test_rotary(label) -> None:
    name, (q, k, cos, sin, interleaved) = DOUBLE[label]
    # A table has a column for each column: those of one pair are equal in models, not here.
    pairs = pairs_of(8, interleaved)
    first, second = ([pair[i] for pair in pairs] for i in (0, 1))
    for x, found in zip((q, k), OPS[name].reference(q, k, cos, sin, interleaved), strict=True):
        one = rotated(x, cos[..., first], sin[..., first], pairs)
        two = rotated(x, cos[..., second], sin[..., second], pairs)
        close(found[..., first], one[..., first])
        close(found[..., second], two[..., second])
        close(found[..., 8:], x[..., 8:])


@pytest.mark.parametrize("label", ["add_norm rms", "add_norm layer"])
def test_add_norm(label) -> None:
    name, (x, residual, weight, bias, eps, norm) = DOUBLE[label]
    total, normed = OPS[name].reference(x, residual, weight, bias, eps, norm)
    wanted = x + residual
    close(total, wanted)
    wanted = wanted - wanted.mean(-1, keepdim=True) if norm == "layer" else wanted
    wanted = wanted / (wanted.square().mean(-1, keepdim=True) + eps).sqrt() * weight
    close(normed, wanted if bias is None else wanted + bias)


def test_products() -> None:
    name, (x, gate, up, gate_bias, up_bias, activation) = DOUBLE["gated_feed_forward"]
    gated = x @ gate.T
    close(
        OPS[name].reference(x, gate, up, gate_bias, up_bias, activation),
        gated * torch.sigmoid(gated) * (x @ up.T + up_bias),
    )
    name, (x, down, up, bias, activation) = DOUBLE["low_rank_linear"]
    close(
        OPS[name].reference(x, down, up, bias, activation),
        ACTIVATIONS[activation](x @ (up @ down).T + bias),
    )
