"""Attention over a cache of latent keys and values, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


def latent_attention(
    q: Tensor,
    key_latent: Tensor,
    key_up: Tensor,
    value_latent: Tensor,
    value_up: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    mask: Tensor | None,
    interleaved: bool,
    scale: float | None,
    key_gain: Tensor | None = None,
    key_eps: float | None = None,
) -> Tensor:
    """Rebuilds keys from their latents, normalises and rotates them, and attends.

    Of h query heads, n key heads and g groups of heads, each number is a multiple of the next; all
    are spread evenly, in order. Keys without rotation need no such op: their up projection can be
    absorbed into the queries.

    Args:
        q: [b, h, s, d], rotated.
        key_latent: [b, t, g, r], one latent for the key heads of a group.
        key_up: [n, d, r], from a latent to a key head.
        value_latent: [b, t, g, e].
        value_up: [m, f, e], from a latent to a value head, h a multiple of m; None where the
            output projection has absorbed it.
        cos: [b or 1, t, d / 2], a column for each pair of columns.
        sin: as `cos`.
        mask: added to the scores, or boolean with True where a key is seen; it broadcasts to
            [b, h, s, t]. A row that sees no key gives zeros.
        interleaved: pairs are columns 2i and 2i+1; otherwise i and i + d/2.
        scale: None for 1 / sqrt(d).
        key_gain: [d], what normalised keys are multiplied by.
        key_eps: added to the mean square of a key, by whose root it is divided before it is
            rotated; None: keys are not normalised.

    Returns:
        [b, h, s, f], or [b, h, s, e] without `value_up`.
    """
    batch, length, groups, rank = key_latent.shape
    heads, (count, width, _) = q.shape[1], key_up.shape
    ups = key_up.reshape(groups, count // groups * width, rank)
    keys = key_latent.transpose(1, 2) @ ups.mT
    keys = keys.view(batch, groups, length, count // groups, width).transpose(2, 3)
    if key_eps is not None:
        keys = torch.rms_norm(keys, (width,), key_gain, key_eps)
    keys = _rotated(keys.flatten(1, 2), cos.unsqueeze(1), sin.unsqueeze(1), interleaved)
    latents = scaled_dot_product_attention(
        q,
        keys.repeat_interleave(heads // count, 1),
        value_latent.transpose(1, 2).repeat_interleave(heads // groups, 1),
        attn_mask=mask,
        scale=scale,
    )
    if value_up is None:
        return latents.contiguous()
    return latents @ value_up.repeat_interleave(heads // value_up.shape[0], 0).mT


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    half = x.shape[-1] // 2
    one, two = (x[..., ::2], x[..., 1::2]) if interleaved else (x[..., :half], x[..., half:])
    turned = one * cos - two * sin, two * cos + one * sin
    joined = torch.stack(turned, -1).flatten(-2) if interleaved else torch.cat(turned, -1)
    return joined.to(x.dtype)
