"""`head_bases`: directions of an attention's heads, the most important first, to cut head widths.

Values and output. A head adds `O_h W_v x` to the branch, so any basis of the head's channels that
is put into `W_v` can be taken out of `O_h` again. In the directions of the truncation of `O_h` on
what the head really gives (`redpass.analysis.ranks.whitening`), the first `r` channels are the best
`r` there are, and no further product is needed: `W_v' = D W_v`, `O_h' = U`. Query heads that share
a value head share its directions. The output projection is then fitted anew to all heads at once.

Queries and keys. A score is `q . k`, so with nothing between the projections and the core (no
rotary embedding, no norm) `q' = A q`, `k' = B k` with `Aᵀ B` of rank `r` can stand for them. The
best directions for the squared error of the scores come from `E[q qᵀ]` and the covariance of `k`
(the mean key moves all scores of a query alike, which softmax does not see).

Source: CLOVER (Meng et al. 2024, arXiv:2411.17426) for joint directions of `W_v, W_o` and of
`W_q, W_k`; there from the weights alone, which is `basis="weights"` here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from redpass.analysis.heads.cuts import HeadCut, Part
from redpass.analysis.heads.sites import HeadSite, Side
from redpass.analysis.observers import CrossGram, Observer, Spread
from redpass.analysis.ranks.whitening import centred, decompose, shrunk
from redpass.analysis.statistics import Statistics
from redpass.analysis.stream_shares import Scales
from redpass.facts import Facts
from redpass.program import Program

BASES = ("activations", "weights", "magnitude")
"""What directions are chosen by. `magnitude` keeps single channels, those with the largest product
of norms on both sides: a control."""

RIDGE = 1e-6
"""Of the mean squared channel, in fits of the output projection."""


@dataclass(frozen=True, eq=False)
class Basis:
    """Directions of one head's channels.

    Attributes:
        down: `[width, width]`; its first `r` rows make the narrow head.
        up: `[n, width]`; its first `r` columns read it.
        own: how many of them the weights really have.
    """

    down: Tensor
    up: Tensor
    own: int


@dataclass(frozen=True, eq=False)
class Moments:
    """Second moments of the input of a linear, float64: `E[x xᵀ]`, `E[x]`, and tokens."""

    gram: Tensor
    mean: Tensor
    tokens: int

    @staticmethod
    def of(name: str, sums: Statistics) -> Moments:
        """Those of the value of a node."""
        found = sums.moments(name, name)
        return Moments(found.gram / found.tokens, found.left_sum / found.tokens, found.tokens)

    def through(self, weight: Tensor, bias: Tensor | None, *, is_centred: bool) -> Tensor:
        """`E[y yᵀ]` of `y = W x + b`, or the covariance."""
        w = weight.double()
        moved: Tensor = w @ centred(self.gram, self.mean) @ w.T
        if is_centred:
            return moved
        mean = w @ self.mean + (0.0 if bias is None else bias.double())
        moved += torch.outer(mean, mean)
        return moved


def observers(site: HeadSite) -> list[Observer]:
    """Returns what `values` and `keys` need to have summed up."""
    inputs = {side.linear.input for side in site.sides.values()} | {site.output.input}
    grams: list[Observer] = [CrossGram(name, name) for name in sorted(inputs)]
    branch = site.branch
    squares = (site.output.node, branch.exit, branch.join, branch.after)
    return [*grams, *map(Spread, squares)]


class Values:
    """Cuts of value heads.

    Attributes:
        bases: one a value head.
    """

    def __init__(self, program: Program, facts: Facts, site: HeadSite, sums: Statistics) -> None:
        self.site, self.program = site, program
        self.side = site.sides["value"]
        found = Moments.of(site.output.input, sums)
        self.output = site.output_weight().double()
        self.bias = site.output.offset(program)
        columns = site.columns.flatten()
        self.mean = found.mean[columns]
        gram = found.gram[columns][:, columns]
        gram = gram if self.bias is None else centred(gram, self.mean)
        white = self.side.weight(program).double()
        usual = torch.block_diag(*[(white @ white.mT)[head] for head in self.side.of_head])
        self.gram = shrunk(gram, found.tokens, usual)
        self.tokens = found.tokens
        is_centred = self.bias is not None
        self.scale = Scales(program, facts).of(site.output, sums, is_centred=is_centred)

    def bases(self, basis: str) -> tuple[Basis, ...]:
        """Returns directions for each value head."""
        return tuple(self._basis(head, basis) for head in range(self.side.heads))

    def _readers(self, head: int) -> list[int]:
        return [core for core, read in enumerate(self.side.of_head) if read == head]

    def _basis(self, head: int, basis: str) -> Basis:
        readers, width = self._readers(head), self.side.width
        reading = self.output[:, readers].transpose(0, 1).flatten(0, 1)
        weight = self.side.weight(self.program)[head].double()
        if basis == "magnitude":
            return _by_size(weight.norm(dim=1) * reading.norm(dim=0), reading)
        white = weight @ weight.T
        bias = self.side.bias(self.program)
        if bias is not None and self.bias is None:
            white += torch.outer(bias[head], bias[head]).double()
        cut = decompose(reading, white)
        own = cut.rank()
        if basis == "activations":
            blocks = self.gram.unflatten(0, (-1, width)).unflatten(2, (-1, width))
            cut = decompose(reading, torch.stack([blocks[r, :, r] for r in readers]).mean(0))
        left = cut.left(len(cut.energies))
        return Basis(left.T @ reading, left, own)

    def cut(self, bases: Sequence[Basis], width: int, *, refit: bool) -> tuple[HeadCut, float]:
        """Returns the heads with that many channels, and the predicted loss."""
        down = torch.stack([basis.down[:width] for basis in bases])
        output = torch.empty(*self.output.shape[:2], width, dtype=torch.float64)
        for head, basis in enumerate(bases):
            readers = self._readers(head)
            parts = basis.up[:, :width].unflatten(0, (len(readers), -1)).transpose(0, 1)
            output[:, readers] = parts
        whole = torch.block_diag(*[down[read] for read in self.side.of_head])
        if refit:
            output = self._fitted(whole).unflatten(1, (-1, width))
        change = self.output.flatten(1) - output.flatten(1) @ whole
        bias = None if self.bias is None else self.bias.double() + change @ self.mean
        part = _turned(self.program, self.side, down)
        loss = float(((change @ self.gram) * change).sum()) * self.scale
        return HeadCut(value=part, output=output, output_bias=bias), max(loss, 0.0)

    def _fitted(self, whole: Tensor) -> Tensor:
        """The output projection of least squared error on the narrow heads."""
        narrow = whole @ self.gram
        square = narrow @ whole.T
        ridge = max(RIDGE * float(square.diagonal().mean()), 1e-30)
        square.diagonal().add_(ridge)
        fitted: Tensor = torch.linalg.solve(square, narrow @ self.output.flatten(1).T)
        return fitted.T


class Keys:
    """Cuts of query and key heads that nothing stands between."""

    def __init__(self, program: Program, site: HeadSite, sums: Statistics) -> None:
        self.site, self.program = site, program
        self.query, self.key = site.sides["query"], site.sides["key"]
        self.queries = self._moments(self.query, sums, is_centred=False)
        self.keys = self._moments(self.key, sums, is_centred=True)
        self.share = Scales.share(site.branch, sums)

    def _moments(self, side: Side, sums: Statistics, *, is_centred: bool) -> list[Tensor]:
        """The second moments of each head's channels."""
        found = Moments.of(side.linear.input, sums)
        weight, bias = side.weight(self.program), side.bias(self.program)
        biases: Sequence[Tensor | None] = [None] * side.heads if bias is None else list(bias)
        return [
            shrunk(found.through(w, b, is_centred=is_centred), found.tokens, w @ w.T)
            for w, b in zip(weight.double(), biases, strict=True)
        ]

    def bases(self, basis: str) -> tuple[Basis, ...]:
        """Returns directions for each key head: `down` for keys, `up` transposed for queries."""
        return tuple(self._basis(head, group, basis) for head, group in enumerate(self.site.groups))

    def _basis(self, head: int, group: Sequence[int], basis: str) -> Basis:
        weight = self.key.weight(self.program)[head].double()
        reading = self.query.weight(self.program)[list(group)].double()
        keys, queries = weight @ weight.T, (reading @ reading.mT).sum(0)
        if basis == "magnitude":
            one = torch.eye(len(keys), dtype=torch.float64)
            return _by_size(keys.diagonal() * queries.diagonal(), one)
        bias = self.query.bias(self.program)
        if bias is not None:
            queries += bias[list(group)].double().T @ bias[list(group)].double()
        own = queries, keys
        if basis == "activations":
            keys = self.keys[head]
            queries = torch.stack([self.queries[h] for h in group]).sum(0)
        return directions(queries, keys, *own)[0]

    def cut(
        self, bases: Sequence[Basis], width: int, *, refit: bool = True
    ) -> tuple[HeadCut, float]:
        """Returns the heads with that many channels, and the predicted loss.

        A small change of the scores changes what a head gives by a share as large as its variance
        over keys; a large one by no more than all of it.

        Args:
            refit: changes nothing: joint directions are the best there are.
        """
        del refit
        down = torch.stack([basis.down[:width] for basis in bases])
        up = torch.stack([basis.up[:, :width].T for basis in bases])
        of_head = self.site.sides["key"].of_head
        queries = _turned(self.program, self.query, up[list(of_head)])
        keys = _turned(self.program, self.key, down)
        scale = (self.site.attention.scale or 1.0) ** 2
        errors = []
        for head, group in enumerate(self.site.groups):
            lost = [
                lost_scores(self.queries[h], self.keys[head], down[head], up[head]) for h in group
            ]
            errors += [min(1.0, scale * error) for error in lost]
        return HeadCut(query=queries, key=keys), self.share * sum(errors) / len(errors)


def directions(
    queries: Tensor, keys: Tensor, own_queries: Tensor, own_keys: Tensor
) -> tuple[Basis, Tensor]:
    """Returns joint directions of queries and keys of given second moments, with their energies.

    Args:
        own_queries: what the weights alone give, to tell how many directions they really have.
    """
    own = decompose(_root(own_queries)[0], own_keys).rank()
    root, inverse = _root(queries)
    cut = decompose(root, keys)
    left = cut.left(len(root))
    return Basis(left.T @ root, inverse @ left, own), cut.energies


def lost_scores(queries: Tensor, keys: Tensor, down: Tensor, up: Tensor) -> float:
    """Returns the expected squared error of scores when keys become `upᵀ down k`."""
    gap = torch.eye(len(keys), dtype=torch.float64) - up.T @ down
    return float((queries * (gap @ keys @ gap.T)).sum())


def _turned(program: Program, side: Side, down: Tensor) -> Part:
    """The heads of a side in other directions, `[heads, new width, width]`."""
    bias = side.bias(program)
    turned = None if bias is None else (down @ bias.double().unsqueeze(-1)).squeeze(-1)
    return Part(down @ side.weight(program).double(), turned)


def _by_size(sizes: Tensor, reading: Tensor) -> Basis:
    order = sizes.argsort(descending=True)
    down = torch.eye(len(sizes), dtype=torch.float64)[order]
    return Basis(down, reading[:, order], int((sizes > 0).sum()))


def _root(gram: Tensor) -> tuple[Tensor, Tensor]:
    """The symmetric root, and its inverse where there is something to invert."""
    energies, vectors = torch.linalg.eigh(gram)
    roots = energies.clamp_min(0.0).sqrt()
    kept = roots > 1e-7 * roots.max()
    inverse = torch.where(kept, 1.0 / roots.clamp_min(1e-150), 0.0)
    return (vectors * roots) @ vectors.T, (vectors * inverse) @ vectors.T


def merged(left: HeadCut, right: HeadCut) -> HeadCut:
    """Returns the cut of values and that of queries and keys as one."""
    return HeadCut(
        query=left.query or right.query,
        key=left.key or right.key,
        value=left.value or right.value,
        output=left.output if right.output is None else right.output,
        output_bias=left.output_bias if right.output_bias is None else right.output_bias,
        planes=left.planes or right.planes,
    )
