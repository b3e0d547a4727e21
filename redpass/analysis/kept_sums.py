"""Sums of a calibration run, kept beside the journal of a run that may be killed and resumed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from redpass import kept_tensors
from redpass.analysis.observers import Observer
from redpass.analysis.statistics import PORTION, Statistics, collect, footprint, shape_of
from redpass.analysis.tokens import Tokens
from redpass.blocks import Blocks
from redpass.data import Batches
from redpass.fingerprint import fingerprint
from redpass.program import Program


def recalled(
    program: Program,
    observers: Iterable[Observer],
    data: Batches,
    blocks: Blocks,
    *,
    labels: Mapping[str, str] | None = None,
) -> Statistics:
    """Returns the sums that an earlier part of the same run kept, or collects and keeps them.

    Args:
        observers: of kinds whose `repr` says all about them.
        blocks: where sums are kept.
        labels: as `collect` takes them, which also says what is raised.
    """
    wanted = tuple(dict.fromkeys(observers))
    if blocks.path is None or footprint(program, wanted) > PORTION:
        return collect(program, wanted, data, labels=labels)
    name = f"sums of {fingerprint(program)} over {data.digest()}: {wanted}"
    kept = kept_tensors.find(blocks, name)
    found = _taken_apart(program, wanted, kept[0]) if kept else None
    if found is None:
        found = collect(program, wanted, data, labels=labels)
        kept_tensors.keep(blocks, name, _as_one(wanted, found))
    return found


def _as_one(observers: Sequence[Observer], found: Statistics) -> Tensor:
    """All token counts, then all sums, as float64."""
    counts = torch.tensor([found.tokens[o] for o in observers], dtype=torch.float64)
    return torch.cat([counts, *(found.totals[o].reshape(-1) for o in observers)])


def _taken_apart(
    program: Program, observers: Sequence[Observer], kept: Tensor
) -> Statistics | None:
    """The sums that `_as_one` put together; None when it is another tensor."""
    tokens = Tokens(program)
    shapes = [shape_of(observer, tokens) for observer in observers]
    sizes = [len(observers), *map(math.prod, shapes)]
    if kept.dtype != torch.float64 or kept.shape != (sum(sizes),):
        return None
    counts, *parts = kept.split(sizes)
    totals = [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]
    seen = map(int, counts.tolist())
    return Statistics(
        dict(zip(observers, totals, strict=True)), dict(zip(observers, seen, strict=True))
    )
