"""`head_contributions`: what each head puts into the residual stream, over tokens.

    E || W_o,h z_h ||^2  /  E || x ||^2

with `z_h` what the head gives, `W_o,h` its columns of the output projection and `x` the stream
behind the attention: the signal for pruning heads (after Michel et al. 2019, arXiv:1905.10650, and
FLAP, An et al. 2024, arXiv:2312.11983), from one run over the calibration data.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product

import torch
from torch import Tensor

from redpass.analysis.heads.sites import HeadSite, head_sites
from redpass.analysis.observers import BlockGram, CrossGram, Observer, Spread
from redpass.analysis.statistics import Statistics, collect
from redpass.analysis.stream_statistics import total
from redpass.facts import Facts
from redpass.program import Program

Contributions = Mapping[str, tuple[float, ...]]


def head_contributions(program: Program, facts: Facts) -> Contributions:
    """Returns branch label -> contribution of each head, as a share of the stream.

    Raises:
        DataError: no calibration data, or values that are NaN or infinite (the branch is named).
    """
    sites = facts.get(head_sites).found
    found = facts.recall("head contributions", lambda: _measure(program, facts, sites))
    return {label: tuple(shares) for label, shares in found.items()}


def _measure(
    program: Program, facts: Facts, sites: Mapping[str, HeadSite]
) -> dict[str, list[float]]:
    wanted = [item for site in sites.values() for item in (_moments(site), _stream(site))]
    labels = {item.values[0]: label for label, s in sites.items() for item in (_moments(s),)}
    sums = collect(program, wanted, facts.data(), labels=labels)
    return {label: _shares(site, sums) for label, site in sites.items()}


def _moments(site: HeadSite) -> Observer:
    """Blocks alone where heads lie one after the other, else the whole matrix."""
    in_order = torch.arange(site.columns.numel()).reshape(site.columns.shape)
    if torch.equal(site.columns, in_order):
        return BlockGram(site.output.input, site.heads)
    return CrossGram(site.output.input, site.output.input)


def _stream(site: HeadSite) -> Observer:
    return Spread(total(site.branch))


def _shares(site: HeadSite, sums: Statistics) -> list[float]:
    found, stream = sums.mean(_moments(site)), float(sums.mean(_stream(site))[1].sum())
    weight = site.output_weight().double()
    shares = []
    for head in range(site.heads):
        columns = site.columns[head]
        gram = found[head][:-1, :-1] if found.dim() == 3 else found[columns][:, columns]
        own: Tensor = weight[:, head]
        shares.append(max(float(((own @ gram) * own).sum()), 0.0) / max(stream, 1e-30))
    return shares


def magnitudes(site: HeadSite) -> tuple[float, ...]:
    """Returns the squared norm of each head's columns of the output projection: a control."""
    return tuple(site.output_weight().double().square().sum((0, 2)).tolist())


def shapes(site: HeadSite) -> dict[int, tuple[tuple[int, int], ...]]:
    """Returns count -> (key heads, query heads of each) that make up so many heads; fewer than all.

    Every key head keeps equally many query heads, so most counts are none where heads are grouped.
    """
    sizes = {len(heads) for heads in site.groups}
    found: dict[int, list[tuple[int, int]]] = {}
    if len(sizes) != 1:
        return {}
    for keys, each in product(range(1, len(site.groups) + 1), range(1, sizes.pop() + 1)):
        if keys * each < site.heads:
            found.setdefault(keys * each, []).append((keys, each))
    return {count: tuple(found[count]) for count in sorted(found, reverse=True)}


def kept_heads(site: HeadSite, shape: tuple[int, int], scores: Sequence[float]) -> tuple[int, ...]:
    """Returns the heads to keep: the best of each key head, and the key heads whose sum is best.

    Args:
        shape: key heads, and query heads of each.
        scores: of each head; equal ones are kept in order.
    """
    keys, each = shape
    best = [sorted(heads, key=lambda h: -scores[h])[:each] for heads in site.groups]
    order = sorted(range(len(best)), key=lambda g: -sum(scores[head] for head in best[g]))
    return tuple(sorted(head for group in order[:keys] for head in best[group]))
