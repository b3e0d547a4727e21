"""`low_rank`: which linears could be two thin ones, and what each rank would cost in quality.

The Gram matrix of a site's inputs (drawn towards equal channels as far as the data are few) gives
the decomposition, in units of predicted loss: the expected squared error that a rank puts into the
residual stream, as a share of the squared stream there. The error of a projection that writes to
the stream is that itself; inside of a branch, the share of the projection's own output that is off
is taken to be the share of the branch that is off.

A linear with a bias is decomposed on the covariance: the new bias makes up for the mean.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from redpass.analysis.linears import linears
from redpass.analysis.observers import CrossGram, Observer, Spread
from redpass.analysis.ranks.fisher import fisher
from redpass.analysis.ranks.sites import Site, factored, sites
from redpass.analysis.ranks.whitening import Decomposition, centred, decompose, shrunk
from redpass.analysis.statistics import Statistics, collect, portions
from redpass.analysis.stream_shares import Scales
from redpass.facts import Facts
from redpass.plan import Edit
from redpass.program import Program


@dataclass(frozen=True, eq=False)
class LowRank:
    """A site with its decomposition.

    Attributes:
        cut: its `errors` are predicted losses (without data: shares of the squared weight).
        means: mean input of each linear whose bias may change, else None.
        own: the rank that the weight has already.
        tokens: how many tokens the statistics are from; 0 without data.
        scale: predicted loss for a squared error of one, by which `cut` was multiplied.
    """

    site: Site
    cut: Decomposition
    means: tuple[Tensor | None, ...]
    own: int
    tokens: int
    scale: float = 1.0

    def ranks(self, shares: Iterable[float], multiple: int) -> tuple[int, ...]:
        """Returns the ladder, falling: ranks that leave these shares, and the rank it has."""
        most, own = self.site.break_even, max(1, self.own)
        wanted = (self.site.rank(share) for share in shares)
        rounded = (rank - rank % multiple for rank in wanted)
        ladder = {rank for rank in rounded if 1 <= rank <= most and rank < own}
        return tuple(sorted(ladder | ({own} if own <= most else set()), reverse=True))

    def loss(self, rank: int) -> float:
        """The predicted loss of a rank."""
        return float(self.cut.errors[rank])

    def edits(self, program: Program, rank: int) -> tuple[Edit, ...]:
        """Returns the edits that cut the site to a rank.

        Raises:
            UsageError: a rank below one or above the smaller side.
        """
        return factored(program, self.site, self.cut.factors(rank), self.means)


def whitened(program: Program, facts: Facts) -> Mapping[str, LowRank]:
    """Decomposes every site for the inputs that the calibration data give it.

    Raises:
        DataError: no calibration data, or values that are NaN or infinite.
    """
    found: dict[str, LowRank] = {}
    known = facts.get(sites).found
    scales = Scales(program, facts)
    wanted = {label: tuple(_observers(site, scales)) for label, site in known.items()}
    for group in portions(program, wanted):
        observers = [observer for label in group for observer in wanted[label]]
        labels = {node: label for label in group for node in _nodes(known[label])}
        sums = collect(program, observers, facts.data(), labels=labels)
        for label in group:
            found[label] = _decomposed(program, known[label], sums, scales, facts)
    return found


def by_fisher(program: Program, facts: Facts) -> Mapping[str, LowRank]:
    """The decompositions of `whitened` with losses from Fisher information, in nats.

    They tell how much an error matters for the program's output, not only for the stream, and
    order what is cut in `whitened` directions. A linear whose output reaches no output loses
    nothing.
    """
    del program
    known = facts.get(fisher)
    found = {}
    for label, item in facts.get(whitened).items():
        left = item.cut.left(len(item.cut.energies))
        weight = torch.zeros_like(item.cut.energies)
        for linear in item.site.linears:
            if linear.node in known:
                weight += (left * (known[linear.node] @ left)).sum(0) / 2
        energies = item.cut.energies / item.scale * weight
        cut = replace(item.cut, energies=energies)
        found[label] = replace(item, cut=cut)
    return found


def plain(program: Program, facts: Facts) -> Mapping[str, LowRank]:
    """Decomposes every site as a matrix, whatever it reads. With data, losses are from the data.

    The control of `whitened`, and what can be had without data.
    """
    if facts.calibration is not None:
        return {
            label: replace(item, cut=_measured(program, item))
            for label, item in facts.get(whitened).items()
        }
    found = {}
    for label, site in facts.get(sites).found.items():
        cut = decompose(site.linears[0].matrix(program))
        share = cut.energies / max(cut.total, 1e-300)
        cut = replace(cut, energies=share)
        found[label] = LowRank(site, cut, (None,) * len(site.linears), cut.rank(), 0)
    return found


def _measured(program: Program, item: LowRank) -> Decomposition:
    """The plain decomposition; what its directions lose is told by the whitened one's energies."""
    cut = decompose(item.site.linears[0].matrix(program))
    rank = len(cut.energies)
    overlap = item.cut.left(rank).T @ cut.left(rank)
    energies = overlap.square().T @ item.cut.energies
    return replace(cut, energies=energies)


def _observers(site: Site, scales: Scales) -> Iterator[Observer]:
    for linear in site.linears:
        yield CrossGram(linear.input, linear.input)
        yield Spread(linear.node)
        yield from map(Spread, scales.values(linear))


def _nodes(site: Site) -> list[str]:
    return [node for linear in site.linears for node in (linear.input, linear.node)]


def _decomposed(
    program: Program, site: Site, sums: Statistics, scales: Scales, facts: Facts
) -> LowRank:
    gram = torch.zeros(site.shape[1], site.shape[1], dtype=torch.float64)
    means: list[Tensor | None] = []
    tokens, whole = 0, 0.0
    for linear in site.linears:
        moments = sums.moments(linear.input, linear.input)
        mean = moments.left_sum / moments.tokens
        part = moments.gram / moments.tokens
        is_free = linear.bias is not None and not facts.get(linears).shared([linear.bias])
        part = shrunk(centred(part, mean) if is_free else part, moments.tokens)
        scale = scales.of(linear, sums, is_centred=is_free)
        gram += scale * part
        whole += scale
        means.append(mean if is_free else None)
        tokens += moments.tokens
    cut = decompose(site.linears[0].matrix(program), gram)
    return LowRank(site, cut, tuple(means), cut.rank(), tokens, whole)
