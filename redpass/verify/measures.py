"""What each metric measures on one batch, row by row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from redpass.data import LABELS, Batch
from redpass.verify.estimate import Estimate, Samples, join, mean
from redpass.verify.logits import token_divergences, token_losses
from redpass.verify.originals import Originals

IGNORED = -100
"""A label that is not counted, as in PyTorch's cross entropy."""

NEIGHBOURS = 10
PIECE = 1024
"""Rows of the similarity matrix that are looked at together."""


@dataclass(frozen=True)
class View:
    """One batch as metrics see it.

    Attributes:
        now: the program's output, `[batch, ...]`.
        number: the batch's place in the data.
    """

    now: Tensor
    batch: Batch
    number: int
    originals: Originals

    @property
    def was(self) -> Tensor:
        """The original's output."""
        return self.originals.output(self.number)

    def kept(self, name: str, compute: Callable[[], Tensor]) -> Tensor:
        """Returns a figure of the original on this batch, computed once."""
        value: Tensor = self.originals.keep((name, self.number), compute)
        return value

    @property
    def mask(self) -> Tensor:
        """Which positions count: bool, the shape of the output without its last axis."""
        return position_mask(self.batch, self.now.shape)


def position_mask(batch: Batch, shape: tuple[int, ...]) -> Tensor:
    """Returns which positions of an output of `shape` are not padding."""
    given = batch.get("attention_mask")
    if given is not None and given.dim() == 2 and len(shape) == 3 and given.shape[1] >= shape[1]:
        return given[:, given.shape[1] - shape[1] :].bool()
    return torch.ones(shape[:-1], dtype=torch.bool)


def target_mask(batch: Batch, shape: tuple[int, ...]) -> Tensor:
    """Returns which next tokens count: those with a real token before them, `[batch, seq - 1]`."""
    mask = position_mask(batch, shape)
    return mask[:, 1:] & mask[:, :-1]


def rows(batch: Batch, shape: tuple[int, ...]) -> int:
    """Counts the rows of a batch whose output has `shape`."""
    return shape[0] if batch else 0


def positions(batch: Batch, shape: tuple[int, ...]) -> int:
    """Counts the positions that are not padding."""
    return int(position_mask(batch, shape).sum())


def targets(batch: Batch, shape: tuple[int, ...]) -> int:
    """Counts the next tokens that are predicted."""
    return int(target_mask(batch, shape).sum())


def labelled(batch: Batch, shape: tuple[int, ...]) -> int:
    """Counts the labels that are not ignored."""
    return int((batch[LABELS] != IGNORED).sum()) if shape else 0


def losses(view: View) -> Samples:
    """Negative log-likelihood of each next token."""
    targets = view.batch["input_ids"][:, 1:].long()
    now = token_losses(view.now[:, :-1], targets)
    was = view.kept("losses", lambda: token_losses(view.was[:, :-1], targets))
    return _row_sums(now, was, target_mask(view.batch, view.now.shape))


def divergences(view: View) -> Samples:
    """KL of the original's distribution to the program's at each position."""
    value, mask = token_divergences(view.was, view.now), view.mask
    return _row_sums(value, torch.zeros_like(value), mask, value[mask])


def agreements(view: View) -> Samples:
    """1 where the likeliest class is the original's, at each position."""
    best = view.kept("best", lambda: view.was.argmax(-1))
    same = (view.now.argmax(-1) == best).double()
    return _row_sums(_with_nan(same, view.now), torch.ones_like(same), view.mask)


def hits(view: View) -> Samples:
    """1 where the likeliest class is the label."""
    labels = view.batch[LABELS]
    best = view.kept("best", lambda: view.was.argmax(-1))
    now = _with_nan((view.now.argmax(-1) == labels).double(), view.now)
    return _row_sums(now, (best == labels).double(), view.mask & (labels != IGNORED))


def cosines(view: View) -> Samples:
    """Cosine of each row's embedding with the original's."""
    now, was = embeddings(view)
    cosine = torch.nn.functional.cosine_similarity(now, was, dim=-1)
    return _rows(cosine, torch.ones_like(cosine))


def relative_errors(view: View) -> Samples:
    """||now - was|| / ||was|| of each row, padding left out."""
    mask = view.mask.unsqueeze(-1)
    now, was = (torch.where(mask, x.double(), 0.0).flatten(1) for x in (view.now, view.was))
    error, size = (now - was).norm(dim=1), was.norm(dim=1)
    ratio = torch.where(error == 0, 0.0, error / size)
    return _rows(ratio, torch.zeros_like(ratio))


def pairs(view: View) -> Samples:
    """Both programs' embeddings of each row, for a summary that compares rows."""
    now, was = embeddings(view)
    nothing = torch.zeros(len(now), dtype=torch.float64)
    sums = nothing + torch.where(now.isnan().any(-1), torch.nan, 0.0)
    return Samples(sums, nothing, nothing + 1, (now.float(), was.float()))


def embeddings(view: View) -> tuple[Tensor, Tensor]:
    """Returns the program's and the original's embedding of each row, float64 `[batch, width]`."""
    was = view.kept("embeddings", lambda: _embedding(view.was, view.batch))
    return _embedding(view.now, view.batch), was


def _embedding(output: Tensor, batch: Batch) -> Tensor:
    """Mean over the positions that count of `[batch, seq, width]`; else the row, flattened."""
    output = output.double()
    if output.dim() != 3:
        return output.flatten(1)
    mask = position_mask(batch, output.shape).unsqueeze(-1)
    return torch.where(mask, output, 0.0).sum(1) / mask.sum(1).clamp_min(1)


def neighbour_agreement(samples: list[Samples]) -> Estimate:
    """Returns how many of each row's nearest other rows are the same for both programs.

    k is 10, or a quarter of the other rows when there are fewer than 40, at least 1: taking all
    others as neighbours would agree always. Needs the embeddings of all rows at once.
    """
    now, was = (torch.nn.functional.normalize(part, dim=-1) for part in join(samples).extra)
    k = max(1, min(NEIGHBOURS, (len(now) - 1) // 4))
    pieces = torch.arange(len(now)).split(PIECE)  # type: ignore[no-untyped-call]
    shares = torch.cat([_shared(_nearest(now, p, k), _nearest(was, p, k)) for p in pieces])
    return mean([_rows(shares, torch.ones_like(shares))])


def _shared(left: Tensor, right: Tensor) -> Tensor:
    """Share of each row's numbers in `left` that are in `right`'s row too."""
    found = left.unsqueeze(2) == right.unsqueeze(1)
    return found.sum((1, 2)).double() / left.shape[1]


def _nearest(vectors: Tensor, rows: Tensor, k: int) -> Tensor:
    similarity = vectors[rows] @ vectors.T
    similarity[torch.arange(len(rows)), rows] = -torch.inf
    return similarity.topk(k, dim=1).indices


def _rows(now: Tensor, was: Tensor) -> Samples:
    return Samples(now.double(), was.double(), torch.ones(len(now), dtype=torch.float64))


def _row_sums(now: Tensor, was: Tensor, mask: Tensor, *extra: Tensor) -> Samples:
    if mask.dim() == 1:
        now, was, mask = now.unsqueeze(1), was.unsqueeze(1), mask.unsqueeze(1)
    first, second = (torch.where(mask, x.double(), 0.0).flatten(1).sum(1) for x in (now, was))
    return Samples(first, second, mask.flatten(1).sum(1).double(), extra)


def _with_nan(value: Tensor, source: Tensor) -> Tensor:
    """Lets NaN in the logits show: argmax would hide it."""
    return torch.where(source.isnan().any(-1), torch.nan, value)
