"""`head_similarity`: how alike the attention probabilities of a layer's heads are, over tokens.

One run over the calibration data. At every attention the probabilities `P_h` of all heads are
formed as the core does (scale, mask, causal flag, soft cap; taken from the softmax where the core
is spelled out), a few rows at a time, and of each row, over the keys that it may see,

    G[h, g] += sum over keys of (P_h - 1 / n) (P_g - 1 / n),    n visible keys

so what is kept is one `[heads, heads]` matrix a layer, whatever the data. Its correlations are the
signal of CHAI (Agarwal et al. 2024, arXiv:2403.08058), which looked at the first five tokens of
each request instead. Rows that see a single key tell nothing and drop out by themselves.

Probabilities that differ need not matter: on tokens whose values are small (attention sinks), or
in a head that the output projection hardly reads. So what it would cost that one head's
probabilities stand for another's is measured as well, on up to `SAMPLED` queries of a sequence,

    C[h, g] = E || (P_h - P_g) V_h W_o,h ||^2.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from redpass import ops
from redpass.analysis.cores import Core
from redpass.analysis.heads.sites import HeadSite, head_sites
from redpass.analysis.tokens import Tokens
from redpass.errors import DataError
from redpass.facts import Facts
from redpass.program import Program, interpret
from redpass.verify.inputs import complete

PIECE = 1 << 22
"""Probabilities that are held at once."""

SAMPLED = 256
"""Queries of a sequence, evenly spread, that the costs are measured on: each takes one product
with the values for each pair of heads."""


@dataclass(frozen=True)
class Similarity:
    """What the heads of one attention have in common.

    Attributes:
        gram: `G`, `[heads, heads]`, float64 as nested tuples.
        rows: how many queries were looked at.
        costs: `C`, `[heads, heads]`: of letting the column's head stand for the row's, in units of
            what a usual head gives, so that 1 is much and 0 is equal.
    """

    gram: tuple[tuple[float, ...], ...]
    rows: int
    costs: tuple[tuple[float, ...], ...]

    @property
    def correlations(self) -> Tensor:
        """Correlation of the heads' probabilities, `[heads, heads]`; of a constant head 0."""
        gram = torch.tensor(self.gram, dtype=torch.float64)
        size = gram.diagonal().clamp_min(0).sqrt()
        found = gram / torch.outer(size, size).clamp_min(1e-30)
        return found.clamp(-1, 1).fill_diagonal_(1.0)

    @property
    def distances(self) -> Tensor:
        """The costs as a matrix, float64."""
        return torch.tensor(self.costs, dtype=torch.float64)


def head_similarity(program: Program, facts: Facts) -> Mapping[str, Similarity]:
    """Measures every attention of `head_sites`; the result by branch label.

    Raises:
        DataError: no calibration data, no token that is not padding, or values that are NaN or
            infinite (the branch is named).
    """
    sites = facts.get(head_sites).found
    found = facts.recall("head similarity", lambda: _measure(program, facts, sites))
    return {
        label: Similarity(
            tuple(map(tuple, item["gram"])), item["rows"], tuple(map(tuple, item["costs"]))
        )
        for label, item in found.items()
    }


def _measure(
    program: Program, facts: Facts, sites: Mapping[str, HeadSite]
) -> dict[str, dict[str, Any]]:
    run = _Run(program, sites)
    data = facts.data()
    for batch in data:
        run.add(complete(program, batch))
    if not all(run.rows.values()):
        text = "every token is padding"
        raise DataError(text, file=data.source, hint="give rows that hold text")
    return {label: run.figures(label) for label in sites}


class _Run:
    def __init__(self, program: Program, sites: Mapping[str, HeadSite]) -> None:
        self.program, self.tokens = program, Tokens(program)
        self.sites = {site.core.node.name: site for site in sites.values()}
        self.grams = {
            label: torch.zeros(site.heads, site.heads, dtype=torch.float64)
            for label, site in sites.items()
        }
        self.rows = dict.fromkeys(sites, 0)
        self.costs = {label: torch.zeros_like(gram) for label, gram in self.grams.items()}
        self.sizes = dict.fromkeys(sites, 0.0)
        self.readers = {label: _readers(site) for label, site in sites.items()}
        self.needed = {
            node.name
            for site in sites.values()
            for node in (site.core.query, site.core.key, site.core.value, *site.core.masks)
        }

    def figures(self, label: str) -> dict[str, Any]:
        """Returns what was measured at one attention."""
        costs = self.costs[label] / max(self.sizes[label] / len(self.costs[label]), 1e-30)
        gram = self.grams[label].tolist()
        return {"gram": gram, "rows": self.rows[label], "costs": costs.tolist()}

    def add(self, inputs: Mapping[str, Tensor]) -> None:
        """Runs one batch."""
        seen: dict[str, Tensor] = {}

        def watch(node: fx.Node, value: Any) -> Any:
            if node.name in self.needed:
                seen[node.name] = value
            if node.name in self.sites:
                site = self.sites[node.name]
                self._sum(site, value, seen, inputs)
                for operand in (site.core.query, site.core.key):
                    seen.pop(operand.name, None)
            return value

        names = [port.name for port in self.program.signature.inputs]
        interpret(self.program, [inputs[name] for name in names], watch)

    def _sum(
        self, site: HeadSite, value: Any, seen: Mapping[str, Tensor], inputs: Mapping[str, Tensor]
    ) -> None:
        pairs = _operands(site, value, seen)
        values = _values(site, seen[site.core.value.name], len(pairs[0])) @ self.readers[site.label]
        kept = self._kept(site, pairs[0].shape[0], pairs[0].shape[2], inputs)
        for number in range(len(kept)):
            places = kept[number].nonzero().flatten()
            step = max(1, PIECE // (site.heads * pairs[1].shape[2]))
            every = max(1, len(places) // SAMPLED)
            for start in range(0, len(places), step):
                rows = places[start : start + step]
                found = _probabilities(site.core, pairs, number, rows).double()
                if not bool(torch.isfinite(found).all()):
                    text = "its probabilities on the calibration data are NaN or infinite"
                    raise DataError(text, place=site.label)
                counts = (found.sum(0) > 0).sum(-1).clamp_min(1)
                flat = found.flatten(1)
                self.grams[site.label] += flat @ flat.T - (1.0 / counts).sum()
                self.rows[site.label] += len(rows)
                self._add_costs(site.label, found[:, ::every].float(), values[number])

    def _add_costs(self, label: str, found: Tensor, values: Tensor) -> None:
        """Adds queries: probabilities `[heads, rows, keys]`, `V_h W_o,h` `[heads, keys, width]`."""
        for head, value in enumerate(values):
            given = (found.flatten(0, 1) @ value).unflatten(0, found.shape[:2]).double()
            self.costs[label][head] += (given - given[head]).square().sum((1, 2))
            self.sizes[label] += float(given[head].square().sum())

    def _kept(
        self, site: HeadSite, batch: int, length: int, inputs: Mapping[str, Tensor]
    ) -> Tensor:
        """Which queries are no padding, `[batch, length]`."""
        node = self.program.nodes[site.output.input]
        lead = (batch * length,) if node.meta["val"].dim() == 2 else (batch, length)
        numbers = torch.arange(batch * length).reshape(*lead, 1)
        kept = torch.zeros(batch * length, dtype=torch.bool)
        kept[self.tokens.rows(node.name, numbers, inputs).flatten()] = True
        return kept.reshape(batch, length)


Operands = tuple[Tensor, Tensor, Tensor | None]
"""Queries `[b, heads, s, d]`, keys `[b, heads, t, d]`, mask; or twice probabilities and None."""


def _operands(site: HeadSite, value: Any, seen: Mapping[str, Tensor]) -> Operands:
    core = site.core
    if not core.is_fused:
        found = value.reshape(-1, site.heads, *value.shape[-2:])
        return found, found.transpose(-1, -2), None
    query, key = (_lead(seen[node.name]) for node in (core.query, core.key))
    if key.shape[1] != query.shape[1]:
        key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    return query, key, seen[core.masks[0].name] if core.masks else None


def _values(site: HeadSite, value: Tensor, batch: int) -> Tensor:
    """What each head sums up, `[batch, heads, keys, width]`, float32."""
    found = value.reshape(batch, -1, *value.shape[-2:]).float()
    return found.repeat_interleave(site.heads // found.shape[1], 1)


def _readers(site: HeadSite) -> Tensor:
    """`R_h` with `|| v R_h || = || v W_o,h ||`, `[heads, width, width]`, float32."""
    columns = site.output_weight().double().movedim(1, 0)
    triangle: Tensor = torch.linalg.qr(columns, mode="r").R
    return triangle.mT.float()


def _lead(value: Tensor) -> Tensor:
    return value if value.dim() == 4 else value[None]


def _probabilities(core: Core, pairs: Operands, number: int, rows: Tensor) -> Tensor:
    """`[heads, rows, keys]` of one sequence, for some of its queries."""
    query, key, mask = pairs
    if not core.is_fused:
        return query[number][:, rows]
    scale = core.factor if core.factor is not None else query.shape[-1] ** -0.5
    scores = scale * (query[number][:, rows].float() @ key[number].float().transpose(-1, -2))
    if mask is not None:
        wide = torch.broadcast_to(mask, (*query.shape[:3], key.shape[2]))[number][:, rows]
        shut = wide if wide.dtype == torch.bool else None
        scores = scores + wide if shut is None else scores.masked_fill(~shut, float("-inf"))
    if core.causal:
        later = torch.arange(key.shape[2]) > rows[:, None]
        scores = scores.masked_fill(later, float("-inf"))
    # A row that sees no key has no probabilities; it counts as zeros.
    return torch.softmax(scores, -1).nan_to_num(0.0) if mask is not None else scores.softmax(-1)


def is_measurable(site: HeadSite) -> bool:
    """Whether the probabilities of an attention can be formed from what stands in the graph."""
    core = site.core
    if not core.is_fused:
        return True
    return ops.is_call(core.node, "scaled_dot_product_attention") and core.factor is not None
