"""What is measured of a stream before it is cut: second moments of its normed values.

Norms are what reads a stream, so each token counts alike, however long its vector is: the few
tokens whose vectors are a hundred times as long as others' do not choose the directions alone.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from redpass.analysis.observers import NormedGram
from redpass.analysis.rotations.records import Stream, StreamNorm
from redpass.analysis.statistics import LIMIT, Statistics, collect, footprint, portions
from redpass.analysis.tokens import Tokens
from redpass.analysis.widths.statistics import fitted_and_held
from redpass.data import Batches
from redpass.program import Program

Moments = tuple[StreamNorm, Tensor, Tensor | None]
"""A norm with its moments on the two parts of the batches."""


class StreamMoments:
    """Moments behind each norm of one stream; kept where they fit in memory, else measured again.

    Raises:
        DataError: values that are NaN or infinite.
        UsageError: the moments of one norm alone do not fit in memory.
    """

    def __init__(self, program: Program, stream: Stream, data: Batches) -> None:
        self.program, self.stream = program, stream
        self._parts = fitted_and_held(data)
        self._known: list[Moments] = []
        self.tokens = 0

    def __iter__(self) -> Iterator[Moments]:
        if self._known:
            yield from self._known
            return
        wanted = {norm.output: (_observer(norm),) for norm in self.stream.norms}
        norms = {norm.output: norm for norm in self.stream.norms}
        groups = list(portions(self.program, wanted, LIMIT // 2))
        for group in groups:
            found = list(self._measured([norms[name] for name in group]))
            if len(groups) == 1:
                self._known = found
            yield from found

    def _measured(self, norms: list[StreamNorm]) -> Iterator[Moments]:
        observers = [_observer(norm) for norm in norms]
        labels = {norm.input: self.stream.label for norm in norms}
        sums: list[Statistics | None] = [
            None if part is None else collect(self.program, observers, part, labels=labels)
            for part in self._parts
        ]
        self.tokens = sum(s.tokens[observers[0]] for s in sums if s is not None)
        for norm, observer in zip(norms, observers, strict=True):
            fit, held = (None if s is None else s.totals[observer] for s in sums)
            assert fit is not None
            yield norm, fit, held

    def total(self) -> Tensor:
        """`Uᵀ U` summed over all norms and tokens, `[d, d]`."""
        size = self.stream.width
        total = torch.zeros(size, size, dtype=torch.float64)
        for _, fit, held in self:
            total += fit[:-1, :-1] if held is None else (fit + held)[:-1, :-1]
        return total


def why_not_measured(program: Program, stream: Stream) -> str:
    """Returns why a stream's statistics cannot be had, or "". Nothing is run."""
    tokens = Tokens(program)
    for norm in stream.norms:
        if tokens.width(norm.input) != stream.width:
            return f"which axis of {norm.input} holds its features could not be told"
    size = 2 * footprint(program, [_observer(stream.norms[0])])
    if size > LIMIT:
        return f"its second moments take {size / 1e9:.1f} GB, more than {LIMIT / 1e9:.1f} GB"
    return ""


def _observer(norm: StreamNorm) -> NormedGram:
    return NormedGram(norm.input, norm.is_centred, norm.eps)
