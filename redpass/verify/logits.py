"""Figures of next-token distributions, computed in pieces so that a large vocabulary fits."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

PIECE = 1 << 19
"""Elements of logits that a thread looks at together: 2 MiB in float32, which a core's own cache
holds. Pieces of 16 MiB take up to twice as long."""


def token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Returns `-log p(target)` in nats, float32 or wider.

    Args:
        logits: `[..., vocabulary]`.
        targets: int64 `[...]`, each below the vocabulary.
    """
    flat, wanted = logits.flatten(0, -2), targets.flatten()
    losses = flat.new_empty(len(flat), dtype=_wide(flat[:0]).dtype)
    for rows in _pieces(flat):
        part = _wide(flat[rows])
        chosen = part.gather(-1, wanted[rows].unsqueeze(-1)).squeeze(-1)
        losses[rows] = part.logsumexp(-1) - chosen
    return losses.reshape(targets.shape)


def token_divergences(was: Tensor, now: Tensor) -> Tensor:
    """Returns KL(was || now) in nats of the distributions at each position, `[...]`.

    Args:
        was: logits `[..., vocabulary]` of the original.
        now: logits of the program, of the same shape.
    """
    old, new = was.flatten(0, -2), now.flatten(0, -2)
    divergences = old.new_empty(len(old), dtype=_wide(old[:0]).dtype)
    for rows in _pieces(old):
        before, after = _wide(old[rows]).log_softmax(-1), _wide(new[rows]).log_softmax(-1)
        share = before.exp()
        terms = before.sub_(after).mul_(share)
        # A token that the original rules out adds nothing, whatever the program makes of it.
        divergences[rows] = terms.masked_fill_(share == 0, 0.0).sum(-1)
    return divergences.reshape(was.shape[:-1])


def _pieces(flat: Tensor) -> Iterator[slice]:
    step = max(1, PIECE * torch.get_num_threads() // max(1, flat.shape[-1]))
    for start in range(0, len(flat), step):
        yield slice(start, start + step)


def _wide(value: Tensor) -> Tensor:
    return value if value.dtype is torch.float64 else value.float()
