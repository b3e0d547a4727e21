"""`RotatedKeys`: narrower query and key heads with rotary positions between them and the scores.

A score is a sum over planes (pairs of channels of one frequency, see `planes`) and over channels
that are not rotated. Leaving out a plane loses its summand; what commutes with every rotation is a
complex factor for each plane that stays, so that is what can stand in for what is lost. With `g_i`
the summand of plane `i`, `h_i` the same with its queries a quarter turn ahead, and

    M = E[(g, h) (g, h)ᵀ],    M[g_i, g_j] = sum of E[q qᵀ] * cov(k) over the channels of i and j,

planes go by `M[g_i, g_i]`, least first, and the factors `a + b i` of the others minimise
`E (sum of all g - sum of kept (a g + b h))²`. Both moments are of rotated queries and keys, as the
attention compares them on calibration data. Channels that are not rotated are turned freely, as
without rotary positions. Behind a norm of heads the factors are real and go into its gain, with
the factor by which the norm of fewer channels is another one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from redpass.analysis.heads.axes import Unfit
from redpass.analysis.heads.clover import RIDGE, Basis, Moments, directions, lost_scores
from redpass.analysis.heads.cuts import HeadCut, Part
from redpass.analysis.heads.planes import Planes
from redpass.analysis.heads.sites import HeadSite, Side
from redpass.analysis.observers import BlockGram, CrossGram, Observer
from redpass.analysis.ranks.whitening import shrunk
from redpass.analysis.statistics import Statistics
from redpass.analysis.stream_shares import Scales
from redpass.program import Program

SILENT = 1e-12
"""A plane whose weights give less of the squared scores than this gives none."""


@dataclass(frozen=True, eq=False)
class Order:
    """The planes of one key head, the most important first, and directions of the other channels.

    Attributes:
        planes: numbers of planes.
        lost: `[planes + 1]`, squared error of the scores when only the first `n` stay, no repair.
        rest: None where every channel is rotated.
        rest_lost: the same for its directions.
        own: planes, and other channels, that the weights really have.
    """

    planes: Tensor
    lost: Tensor
    rest: Basis | None
    rest_lost: Tensor
    own_planes: int
    own_rest: int

    @property
    def own(self) -> int:
        """The width the weights really have."""
        return 2 * self.own_planes + self.own_rest


@dataclass(frozen=True, eq=False)
class _Head:
    """A new head: `[new width, width]` from the old one, and the channels whose places it takes."""

    places: Tensor
    matrix: Tensor


def rotated_observers(site: HeadSite, planes: Planes) -> list[Observer]:
    """Returns what `RotatedKeys` needs to have summed up."""
    found: list[Observer] = []
    for kind, name in planes.points.items():
        found.append(BlockGram(name, site.sides[kind].heads))
        if planes.norms:
            source = site.sides[kind].linear.input
            found.append(CrossGram(source, source))
    return found


class RotatedKeys:
    """Cuts of query and key heads that rotary positions turn."""

    def __init__(self, program: Program, site: HeadSite, sums: Statistics, planes: Planes) -> None:
        self.site, self.program, self.planes = site, program, planes
        self.query, self.key = site.sides["query"], site.sides["key"]
        self.first, self.second = (torch.tensor(c) for c in (planes.first, planes.second))
        self.rest = torch.tensor(planes.rest, dtype=torch.long)
        self.queries = self._moments(self.query, sums, is_centred=False)
        self.keys = self._moments(self.key, sums, is_centred=True)
        self.sizes = {kind: self._sizes(site.sides[kind], sums) for kind in planes.norms}
        self.share = Scales.share(site.branch, sums)
        self.refused = ""

    def _moments(self, side: Side, sums: Statistics, *, is_centred: bool) -> list[Tensor]:
        seen = BlockGram(self.planes.points[side.kind], side.heads)
        whole = sums.mean(seen)
        found, means = whole[:, :-1, :-1], whole[:, -1, :-1]
        if is_centred:
            found = found - means.unsqueeze(2) * means.unsqueeze(1)
        return [shrunk(gram, sums.tokens[seen], torch.diag(gram.diagonal())) for gram in found]

    def _sizes(self, side: Side, sums: Statistics) -> Tensor:
        """`E x²` of each channel before the norm, `[heads, width]`."""
        found = Moments.of(side.linear.input, sums)
        weight, bias = side.weight(self.program), side.bias(self.program)
        biases: Sequence[Tensor | None] = [None] * side.heads if bias is None else list(bias)
        pairs = zip(weight, biases, strict=True)
        return torch.stack([found.through(w, b, is_centred=False).diagonal() for w, b in pairs])

    def bases(self, basis: str) -> tuple[Order, ...]:
        """Returns the order of planes for each key head."""
        return tuple(self._order(head, group, basis) for head, group in enumerate(self.site.groups))

    def _order(self, head: int, group: Sequence[int], basis: str) -> Order:
        weights = self._weight_moments(head, group)
        both = weights[0] + weights[1]
        # Behind norms a plane that is silent on one side still counts in the norm of the other.
        own = self._strengths(*((both, both) if self.planes.norms else weights))
        queries, keys = torch.stack([self.queries[h] for h in group]).sum(0), self.keys[head]
        if basis != "activations":
            queries, keys = weights
        strengths = self._strengths(queries, keys)
        order = strengths.argsort(descending=True, stable=True)
        rest, rest_lost, own_rest = self._free(queries, keys, weights)
        alive = int((own > SILENT * own.sum().clamp_min(1e-300)).sum())
        return Order(order, _tails(strengths[order]), rest, rest_lost, max(alive, 1), own_rest)

    def _weight_moments(self, head: int, group: Sequence[int]) -> tuple[Tensor, Tensor]:
        """What inputs of one variance would give, over all angles."""
        found = []
        for side, heads in ((self.query, group), (self.key, [head])):
            rows = side.weight(self.program)[list(heads)].double().mT.flatten(0, 1)
            bias = side.bias(self.program)
            if bias is not None:
                rows = torch.cat([rows, bias[list(heads)].double()])
            found.append(rows.T @ rows)
        return found[0], found[1]

    def _strengths(self, queries: Tensor, keys: Tensor) -> Tensor:
        """`M[g_i, g_i]`: the squared summand of each plane."""
        names = (self.first, self.second)
        return torch.stack([queries[a, b] * keys[a, b] for a in names for b in names]).sum(0)

    def _free(
        self, queries: Tensor, keys: Tensor, weights: tuple[Tensor, Tensor]
    ) -> tuple[Basis | None, Tensor, int]:
        if not len(self.rest):
            return None, torch.zeros(1, dtype=torch.float64), 0
        own_q, own_k, q, k = (gram[self.rest][:, self.rest] for gram in (*weights, queries, keys))
        found, energies = directions(q, k, own_q, own_k)
        return found, _tails(energies), max(found.own, 1)

    def fits(self, width: int) -> bool:
        """Whether heads can be that wide."""
        return width >= self.planes.least and (width - self.query.width) % self.planes.step == 0

    def cut(self, bases: Sequence[Order], width: int, *, refit: bool) -> tuple[HeadCut, float]:
        """Returns the heads with that many channels, and the predicted loss.

        Args:
            refit: whether the planes that stay stand in for those that go.

        Raises:
            Unfit: a width that whole planes do not make, or planes that are not turned.
        """
        if self.refused:
            raise Unfit(self.refused)
        if not self.fits(width):
            raise Unfit(f"{width} channels are not whole pairs that rotary positions turn")
        planes, rest = self._split(bases, width)
        keys, queries, errors = [], {}, []
        for head, group in enumerate(self.site.groups):
            order, chosen = bases[head], bases[head].planes[:planes].sort().values
            keys.append(self._key(order, chosen, rest))
            for h in group:
                found = self._query(h, chosen, order, rest, self.keys[head], refit=refit)
                queries[h], error = found
                errors.append(error)
        scale = (self.site.attention.scale or 1.0) ** 2
        loss = self.share * sum(min(1.0, scale * error) for error in errors) / len(errors)
        asked = self._part("query", [queries[h] for h in sorted(queries)])
        key_part = self._part("key", keys)
        return HeadCut(query=asked, key=key_part, planes=self.planes), loss

    def _split(self, bases: Sequence[Order], width: int) -> tuple[int, int]:
        """How many planes and how many other channels stay: those that lose least together."""
        others = len(self.rest)
        found = []
        for planes in range(1, min(len(self.first), width // 2) + 1):
            rest = width - 2 * planes
            if bool(others) <= rest <= others:
                lost = sum(float(b.lost[planes] + b.rest_lost[rest]) for b in bases)
                found.append((lost, planes, rest))
        if not found:
            raise Unfit(f"{width} channels leave it no pair, or none of those not rotated")
        _, planes, rest = min(found)
        return planes, rest

    def _places(self, chosen: Tensor, rest: int) -> Tensor:
        """The channels that the new ones take the places of, rising."""
        return torch.cat([self.first[chosen], self.second[chosen], self.rest[:rest]]).sort().values

    def _key(self, order: Order, chosen: Tensor, rest: int) -> _Head:
        places = self._places(chosen, rest)
        matrix = torch.eye(self.key.width, dtype=torch.float64)
        if order.rest is not None:
            matrix[self.rest[:rest]] = 0.0
            matrix[self.rest[:rest, None], self.rest] = order.rest.down[:rest]
        return _Head(places, matrix[places])

    def _query(
        self, h: int, chosen: Tensor, order: Order, rest: int, key: Tensor, *, refit: bool
    ) -> tuple[_Head, float]:
        """The query head with its factors, and the squared error of its scores."""
        places = self._places(chosen, rest)
        gone = self._residual(h, chosen, key, refit=refit)
        count = len(self.first)
        real, turned = (1.0 - gone[:count])[chosen], -gone[count:][chosen]
        a, b = self.first[chosen], self.second[chosen]
        matrix = torch.eye(self.query.width, dtype=torch.float64)
        matrix[a, a] = matrix[b, b] = real
        matrix[a, b], matrix[b, a] = turned, -turned
        error = float(gone @ self._gram(self.queries[h], key) @ gone)
        if order.rest is not None:
            up = order.rest.up[:, :rest].T
            matrix[self.rest[:rest]] = 0.0
            matrix[self.rest[:rest, None], self.rest] = up
            queries, keys = (x[self.rest][:, self.rest] for x in (self.queries[h], key))
            error += lost_scores(queries, keys, order.rest.down[:rest], up)
        return _Head(places, matrix[places]), max(error, 0.0)

    def _residual(self, h: int, chosen: Tensor, key: Tensor, *, refit: bool) -> Tensor:
        """How much of each summand, and of each a quarter turn ahead, is missing from the score."""
        count = len(self.first)
        gone = torch.zeros(2 * count, dtype=torch.float64)
        gone[:count] = 1.0
        gone[chosen] = 0.0
        if refit and len(chosen) < count:
            stay = chosen if self.planes.norms else torch.cat([chosen, chosen + count])
            gram = self._gram(self.queries[h], key)
            square = gram[stay][:, stay]
            square.diagonal().add_(max(RIDGE * float(square.diagonal().mean()), 1e-30))
            gone[stay] = -torch.linalg.solve(square, gram[stay] @ gone)
        return gone

    def _gram(self, queries: Tensor, keys: Tensor) -> Tensor:
        """`M` over all planes: summands first, then those a quarter turn ahead."""
        a, b = self.first, self.second
        one = torch.ones(len(a), dtype=torch.float64)
        terms = [
            (torch.cat([a, a]), torch.cat([a, b]), torch.cat([one, -one])),
            (torch.cat([b, b]), torch.cat([b, a]), torch.cat([one, one])),
        ]
        return sum(
            (torch.outer(s, t) * queries[q][:, r] * keys[k][:, c])
            for q, k, s in terms
            for r, c, t in terms
        )  # type: ignore[return-value]

    def _part(self, kind: str, heads: Sequence[_Head]) -> Part:
        """The new heads of a side: rows of its matrix mixed within planes, or a norm's gain."""
        side = self.site.sides[kind]
        kept = torch.stack([head.places for head in heads])
        matrix = torch.stack([head.matrix for head in heads])
        gain = None
        if kind in self.sizes:
            gain = matrix.gather(2, kept.unsqueeze(2)).squeeze(2) * self._renormed(kind, kept)
            matrix = torch.eye(side.width, dtype=torch.float64)[kept]
        bias = side.bias(self.program)
        turned = None if bias is None else (matrix @ bias.double().unsqueeze(-1)).squeeze(-1)
        return Part(matrix @ side.weight(self.program).double(), turned, kept, gain)

    def _renormed(self, kind: str, kept: Tensor) -> Tensor:
        """Root mean square of what stays over that of all channels, `[heads, 1]`."""
        sizes = self.sizes[kind]
        left = sizes.gather(1, kept).mean(1, keepdim=True)
        return (left / sizes.mean(1, keepdim=True).clamp_min(1e-300)).sqrt()


def _tails(energies: Tensor) -> Tensor:
    """`[n + 1]`: what is lost when only the first `0..n` stay."""
    return torch.cat([energies.flip(0).cumsum(0).flip(0), energies.new_zeros(1)])
