"""Second moments of what each expert of a stack reads, from the tokens routed to it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from redpass.analysis.statistics import LIMIT, room
from redpass.analysis.tokens import Tokens
from redpass.analysis.widths.experts import Site
from redpass.analysis.widths.narrowing import Reader, Width
from redpass.analysis.widths.statistics import Sums, View, fitted_and_held
from redpass.data import Batches
from redpass.errors import DataError
from redpass.program import Program, interpret
from redpass.verify.inputs import complete

ENOUGH = 8
"""Rows of an expert that must be held back for them to judge how strongly it is fitted."""


@dataclass(eq=False)
class _Moments:
    """Sums of one part of the data: a Gram matrix for each expert, tokens, energy of the stream."""

    grams: Tensor
    rows: Tensor
    tokens: int = 0
    energy: float = 0.0


@dataclass(eq=False)
class _Run:
    """Watches the stacks of experts while batches run."""

    program: Program
    sites: dict[str, Site]
    sizes: dict[str, tuple[int, int]]
    found: dict[str, _Moments] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.tokens = Tokens(self.program)
        for label, (experts, width) in self.sizes.items():
            grams = torch.zeros(experts, width + 1, width + 1, dtype=torch.float64)
            self.found[label] = _Moments(grams, torch.zeros(experts, dtype=torch.int64))
        self.wanted = {
            node.name
            for site in self.sites.values()
            for node in (site.inner, site.ids, site.picked, site.share, site.total)
            if node is not None
        }

    def add(self, data: Batches) -> None:
        names = [port.name for port in self.program.signature.inputs]
        for batch in data:
            inputs, seen = complete(self.program, batch), dict[str, Tensor]()

            def watch(node: fx.Node, value: Any, seen: dict[str, Tensor] = seen) -> Any:
                if node.name in self.wanted:
                    seen[node.name] = value
                return value

            interpret(self.program, [inputs[name] for name in names], watch)
            for label, site in self.sites.items():
                self._sum(label, site, seen, inputs)

    def _sum(
        self, label: str, site: Site, seen: dict[str, Tensor], inputs: dict[str, Tensor]
    ) -> None:
        moments, (tokens, picks) = self.found[label], seen[site.picked.name].shape
        numbers = torch.arange(tokens)[:, None].expand(-1, picks)
        kept = self.tokens.rows(site.picked.name, numbers, inputs)[:, 0]  # padding is left out
        rows = (kept[:, None] * picks + torch.arange(picks)).flatten()
        ids, inner = seen[site.ids.name][rows], seen[site.inner.name][rows].double()
        if not bool(inner.isfinite().all()):
            raise DataError("its values on the calibration data are NaN or infinite", place=label)
        if site.share is not None:
            inner = inner * seen[site.share.name][rows].double()
        inner = torch.nn.functional.pad(inner, (0, 1), value=1.0)
        for expert in ids.unique().tolist():
            own = inner[ids == expert]
            moments.grams[expert] += own.T @ own
            moments.rows[expert] += len(own)
        stream = self.tokens.rows(site.total.name, seen[site.total.name], inputs)
        moments.tokens += len(kept)
        moments.energy += float(stream.double().square().sum())


def _footprint(program: Program, width: Width) -> int:
    """Bytes of the sums of all experts, for both parts of the data."""
    return 16 * len(_stack(program, width)) * (width.size + 1) ** 2


def why_not_measured(program: Program, width: Width) -> str:
    """Returns why the statistics of all experts cannot be had together, or ""."""
    size = _footprint(program, width)
    if size <= LIMIT:
        return ""
    return f"second moments of its experts take {size / 1e9:.1f} GB, more than {LIMIT / 1e9:.1f} GB"


def expert_views(
    program: Program, places: Sequence[tuple[str, Width, Site]], data: Batches
) -> Iterator[tuple[str, Width, list[View], Tensor]]:
    """Yields each width with what each expert sees, and how many rows it got.

    As many stacks as fit in memory share a run.

    Raises:
        DataError: values that are NaN or infinite.
    """
    group: list[tuple[str, Width, Site]] = []
    most = room()
    for place in places:
        if group and sum(_footprint(program, width) for _, width, _ in (*group, place)) > most:
            yield from _views(program, group, data)
            group = []
        group.append(place)
    if group:
        yield from _views(program, group, data)


def _views(
    program: Program, places: Sequence[tuple[str, Width, Site]], data: Batches
) -> Iterator[tuple[str, Width, list[View], Tensor]]:
    sites = {label: site for label, _, site in places}
    sizes = {label: (_stack(program, width).shape[0], width.size) for label, width, _ in places}
    parts: list[_Run] = []
    for part in fitted_and_held(data):
        if part is not None:
            parts.append(_Run(program, sites, sizes))
            parts[-1].add(part)
    for label, width, _ in places:
        sums = [run.found[label] for run in parts]
        tokens = sum(each.tokens for each in sums)
        energy = max(sum(each.energy for each in sums) / max(tokens, 1), 1e-30)
        found = [_view(program, width, sums, n, energy) for n in range(sizes[label][0])]
        yield label, width, found, torch.stack([each.rows for each in sums]).sum(0)


def _stack(program: Program, width: Width) -> Tensor:
    return program.weights[width.readers[0].weight]


def _view(
    program: Program, width: Width, sums: Sequence[_Moments], expert: int, energy: float
) -> View:
    """Sums over an expert's own rows, to be divided by the tokens of all."""
    reader = width.readers[0]
    own = Reader(reader.node, reader.input, reader.weight, 1, "", 1, ((0, 1),))
    fitted, held = Sums(sums[0].grams[expert], sums[0].tokens), None
    if len(sums) > 1 and int(sums[1].rows[expert]) >= ENOUGH:
        held = Sums(sums[1].grams[expert], sums[1].tokens)
    elif len(sums) > 1:
        fitted = fitted + Sums(sums[1].grams[expert], sums[1].tokens)
    rows = _stack(program, width)[expert].movedim(reader.axis - 1, -1).double()
    return View(own, fitted, held, rows, energy)
