"""Rungs of a stream's width: checked options, programs for each width, what they save and lose."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from redpass import rewrite
from redpass.analysis.cost import Cost, total_cost
from redpass.analysis.inspection import DEFAULT_SIZES
from redpass.analysis.linears import linears
from redpass.analysis.rotations.bases import Basis, Fit, basis, channels, fitted, principal
from redpass.analysis.rotations.edits import APART, MIXED, Turning
from redpass.analysis.rotations.records import Stream
from redpass.analysis.rotations.statistics import StreamMoments
from redpass.analysis.rotations.ties import split
from redpass.analysis.rungs import check_rungs, check_word, read_target
from redpass.data import Batches
from redpass.errors import PassError, UsageError
from redpass.facts import Facts
from redpass.plan import Action, Edit
from redpass.verify.inputs import complete

WHOLE = "whole"
TIED = (MIXED, APART, WHOLE)
BASES = ("principal", "channels")


@dataclass(frozen=True)
class Rung:
    """One width of a stream.

    Attributes:
        width: what is left.
        edits: what cuts it.
        error: share of the squared normed stream that readers no longer get, mean over norms, on
            batches held back.
        unrepaired: the same without the fit.
        saving: as in `Action`.
    """

    width: int
    edits: tuple[Edit, ...]
    error: float
    unrepaired: float
    saving: dict[str, float]


def check_options(place: str, shares: Sequence[float], multiple: int, tied: str, kind: str) -> None:
    """Raises `UsageError` for a share outside of (0, 1], a multiple below 1, an unknown word."""
    check_rungs(place, shares, multiple, whole=True)
    check_word(place, "tied", tied, TIED)
    check_word(place, "basis", kind, BASES)


def counts(stream: Stream, shares: Sequence[float], multiple: int) -> list[int]:
    """Returns the widths next to the shares, falling; the whole width only for a share of 1."""
    least = 2 if stream.has_mean else 1
    near = {max(1, round(stream.width * s / multiple)) * multiple for s in shares if s < 1}
    found = {count for count in near if least <= count < stream.width}
    return sorted(found | {stream.width for s in shares if s == 1}, reverse=True)


def named(
    place: str, only: Sequence[str], found: Sequence[Stream], multiple: int
) -> dict[str, list[int]]:
    """Reads `label@width` names: label -> widths, falling.

    Raises:
        UsageError: an unknown label, a stream that cannot be cut, or a width it cannot have.
    """
    wanted: dict[str, list[int]] = {}
    labels = {stream.label: stream for stream in found}
    for name in only:
        label, count = read_target(place, name, labels, "stream")
        stream = labels[label]
        if stream.obstacle:
            raise UsageError(f"'{label}' cannot be cut: {stream.obstacle}", place=place)
        least = 2 if stream.has_mean else 1
        if not least <= count <= stream.width:
            hint = f"it has {stream.width} features: leave {least} to {stream.width}"
            raise UsageError(f"'{name}' leaves {count} features", place=place, hint=hint)
        if count % multiple and count != stream.width:
            hint = f"take {max(multiple, count - count % multiple)}, or give multiple=1"
            text = f"'{name}' leaves {count} features, no multiple of {multiple}"
            raise UsageError(text, place=place, hint=hint)
        wanted.setdefault(label, []).append(count)
    return {label: sorted(set(each), reverse=True) for label, each in wanted.items()}


class Cutter:
    """Measures one stream and makes its rungs.

    Args:
        tied: `mixed`, `apart` or `whole`.

    Raises:
        DataError, UsageError: see `StreamMoments`.
    """

    def __init__(self, facts: Facts, stream: Stream, data: Batches, *, tied: str = MIXED) -> None:
        self.program, self.data, self.tied = facts.program, data, tied
        self.stream = split(facts.program, stream) if tied == WHOLE else stream
        self.table = facts.get(linears)
        self.moments = StreamMoments(facts.program, self.stream, data)

    def bases(self, widths: Sequence[int], kind: str) -> list[Basis]:
        """Returns a basis for each width."""
        total, mean = self.moments.total(), self.stream.has_mean
        found = principal(total, has_mean=mean)
        made = []
        for width in widths:
            count = width - mean
            chosen = (
                channels(total, count, has_mean=mean) if kind == "channels" else found[:, :count]
            )
            made.append(basis(chosen, has_mean=mean))
        return made

    def rungs(self, bases: Sequence[Basis], *, refit: bool) -> Iterator[Rung]:
        """Yields a rung for each basis. Raises `PassError` where the graph does not take it."""
        fits: list[dict[str, Fit]] = [{} for _ in bases]
        for norm, fit, held in self.moments:
            shift = norm.can_shift and not self._would_add_bias(norm.output)
            for made, turned in zip(fits, bases, strict=True):
                made[norm.output] = fitted(turned, fit, held, refit=refit, shift=shift)
        before = total_cost(self.program)
        for made, turned in zip(fits, bases, strict=True):
            edits = self.edits(turned, made)
            after = total_cost(rewrite.apply(self.program, [Action("turn", "here", edits, "")]))
            errors, bare = (
                sum(values) / len(made)
                for values in zip(*((f.error, f.unrepaired) for f in made.values()), strict=True)
            )
            yield Rung(turned.width, edits, errors, bare, _saved(before, after))

    def edits(self, turned: Basis, fits: dict[str, Fit]) -> tuple[Edit, ...]:
        """Returns the edits for one basis."""
        return Turning(self.program, self.stream, turned, self.table, fits, self.tied).edits()

    def fault(self) -> str:
        """Turns the stream at full width and compares: why the outputs differ, or ""."""
        [turned] = self.bases([self.stream.width], "principal")
        try:
            action = Action("turn", "here", self.edits(turned, {}), "")
            after = rewrite.apply(self.program, [action])
        except PassError as error:
            return f"a turn does not go through: {error.found} ({error.place})"
        inputs = complete(self.program, self.data[0])
        named = {port.name: inputs[port.name] for port in self.program.signature.inputs}
        for port, old, new in zip(
            self.program.signature.outputs, self.program(**named), after(**named), strict=True
        ):
            off = _off(old, new)
            if off > _allowed(old):
                return f"a turn at full width changes {port.name} by {off:.2g} of its size"
        return ""

    def _would_add_bias(self, norm: str) -> bool:
        heads = [n for t in self.stream.ties if t.norm == norm for n, _ in t.heads]
        return self.tied == APART and not all(self.table.by_node[name].bias for name in heads)


def _off(old: Tensor, new: Tensor) -> float:
    if not old.is_floating_point() or not old.numel():
        return 0.0
    finite = old.isfinite()
    gap = (new.double() - old.double())[finite].norm()
    return float(gap / old.double()[finite].norm().clamp_min(1e-30))


def _allowed(value: Tensor) -> float:
    """Half of the digits: what rounding leaves, and no wrong turn."""
    return float(torch.finfo(value.dtype).eps ** 0.5) if value.is_floating_point() else 0.0


def _saved(before: Cost, after: Cost) -> dict[str, float]:
    return {
        "parameters": before.parameters - after.parameters,
        "bytes": before.bytes - after.bytes,
        "flops": before.flops(DEFAULT_SIZES) - after.flops(DEFAULT_SIZES),
        "kv_bytes_per_token": 0,
    }
