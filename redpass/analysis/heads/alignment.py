"""Key and value heads merged after alignment: fewer key and value heads for the same queries.

Scores and outputs do not change when the channels of a key head and of its queries, or of a value
head and of its columns of `W_o`, are turned by one orthogonal matrix. So head `j` is first turned
to look most like head `i` (orthogonal Procrustes: with `E[k_i k_jᵀ] = U S Vᵀ` the turn is `U Vᵀ`),
over calibration tokens; heads that are alike then are replaced by their mean.

With rotary embedding a turn of keys must commute with the rotations: only each rotated pair of
channels may be turned in its plane, by one angle each. With a norm on queries or keys none is
left, and keys are merged as they are. Which turns an attention allows is tried, not guessed: a turn
counts only if the attention gives what it gave.

Source: Ainslie et al. 2023, arXiv:2305.13245 (means of key and value heads); Jin et al. 2024,
arXiv:2412.20677 (alignment before).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from redpass.analysis.heads.cuts import HeadCut, Part
from redpass.analysis.heads.sites import HeadSite, Side, head_sites
from redpass.analysis.observers import CrossGram
from redpass.analysis.statistics import collect
from redpass.facts import Facts
from redpass.program import Program

TURNS = ("any", "halves", "pairs", "none")
"""What channels of keys may be mixed: all, `c` with `c + d / 2`, neighbours, none."""

LARGEST = 1 << 30
"""Bytes of sums in one run over the calibration data."""

Blocks = Tensor
"""`E[x_i x_jᵀ]` of all pairs of heads, `[heads, heads, width, width]`, float64."""


@dataclass(frozen=True, eq=False)
class Moments:
    """Second moments of what the key and the value projection of an attention give."""

    key: Blocks
    value: Blocks


def head_moments(program: Program, facts: Facts) -> Mapping[str, Moments]:
    """Returns branch label -> moments; several runs where the sums do not fit in one.

    Raises:
        DataError: no calibration data, or values that are NaN or infinite (the branch is named).
    """
    found: dict[str, Moments] = {}
    for sites in _portions(facts.get(head_sites).found.values()):
        wanted = {name: site.label for site in sites for name in _outputs(site)}
        sums = collect(program, [CrossGram(n, n) for n in wanted], facts.data(), labels=wanted)
        for site in sites:
            key, value = (
                _blocks(sums.moments(name, name).gram, side)
                for name, side in zip(_outputs(site), _sides(site), strict=True)
            )
            found[site.label] = Moments(key, value)
    return found


def _sides(site: HeadSite) -> tuple[Side, Side]:
    return site.sides["key"], site.sides["value"]


def _outputs(site: HeadSite) -> tuple[str, ...]:
    return tuple(side.projection.output or side.linear.node for side in _sides(site))


def _portions(sites: Iterable[HeadSite]) -> Iterator[list[HeadSite]]:
    portion: list[HeadSite] = []
    size = 0
    for site in sites:
        own = sum(8 * side.linear.outs**2 for side in _sides(site))
        if portion and size + own > LARGEST:
            yield portion
            portion, size = [], 0
        portion, size = [*portion, site], size + own
    if portion:
        yield portion


def _blocks(gram: Tensor, side: Side) -> Blocks:
    rows = side.features.flatten()
    own = gram[rows][:, rows].unflatten(1, (side.heads, -1)).unflatten(0, (side.heads, -1))
    found: Tensor = own.transpose(1, 2)
    return found


def turn(moment: Tensor, kind: str) -> Tensor:
    """Returns the orthogonal matrix that turns head `j` nearest to head `i`.

    Args:
        moment: `E[x_i x_jᵀ]`, `[width, width]`.
        kind: one of `TURNS`.
    """
    width = len(moment)
    if kind == "none":
        return torch.eye(width, dtype=moment.dtype)
    if kind == "any":
        left, _, right = torch.linalg.svd(moment)
        nearest: Tensor = left @ right
        return nearest
    half = width // 2
    first = torch.arange(half) if kind == "halves" else torch.arange(0, 2 * half, 2)
    second = first + (half if kind == "halves" else 1)
    across = moment[second, first] - moment[first, second]
    angle = torch.atan2(across, moment[first, first] + moment[second, second])
    found = torch.eye(width, dtype=moment.dtype)
    found[first, first] = found[second, second] = angle.cos()
    found[second, first], found[first, second] = angle.sin(), -angle.sin()
    return found


def turns(blocks: Blocks, members: Sequence[Sequence[int]], kind: str) -> Tensor:
    """Returns the turn of each head towards the first of its members, `[heads, width, width]`."""
    found = torch.eye(blocks.shape[-1], dtype=blocks.dtype).repeat(len(blocks), 1, 1)
    for heads in members:
        for head in heads[1:]:
            found[head] = turn(blocks[heads[0], head], kind)
    return found


def distances(blocks: Blocks, kind: str) -> Tensor:
    """Returns `E||x_i - R x_j||^2` over the mean of both squared norms, for all pairs."""
    count = len(blocks)
    size = torch.stack([blocks[h, h].trace() for h in range(count)])
    found = torch.zeros(count, count, dtype=blocks.dtype)
    for i in range(count):
        for j in range(i):
            alike = (turn(blocks[i, j], kind) * blocks[i, j]).sum()
            whole = (size[i] + size[j]).clamp_min(1e-30)
            found[i, j] = found[j, i] = 2 * (whole - 2 * alike).clamp_min(0) / whole
    return found


def equal_parts(found: Tensor, count: int) -> tuple[tuple[int, ...], ...]:
    """Puts heads into `count` clusters of one size: the nearest pairs first, grown one by one.

    Args:
        found: distances, `[heads, heads]`.
    """
    size, left = len(found) // count, set(range(len(found)))
    parts = []
    while left:
        heads = sorted(left)
        near = {h: float(found[h, heads].sort()[0][:size].sum()) for h in heads}
        first = min(heads, key=near.__getitem__)
        order = sorted(heads, key=lambda h: (float(found[first, h]), h))
        own = [first, *[h for h in order if h != first][: size - 1]]
        left -= set(own)
        parts.append(tuple(own))
    return tuple(sorted(parts, key=min))


def merged(
    site: HeadSite, moments: Moments, members: Sequence[Sequence[int]], kind: str,
    of_values: str = "any", *, mix: bool = True,
) -> HeadCut:  # fmt: skip
    """Returns the cut with one key and value head for each entry of `members`.

    Args:
        members: key heads of each new one; they need be no neighbours, queries are put in order.
        kind: which turns of keys there may be; `of_values` likewise.
        mix: False turns heads and merges none, which changes nothing if the turns are allowed.
    """
    key, value = _sides(site)
    across = turns(moments.key, members, kind), turns(moments.value, members, of_values)
    groups = site.groups
    order = [h for heads in members for g in heads for h in groups[g]]
    group_of = key.of_head
    new = [[g] for heads in members for g in heads] if not mix else members
    query = site.sides["query"]
    asked = torch.tensor([group_of[h] for h in order])
    weight = site.output_weight()
    columns = weight.double()[:, order]
    return HeadCut(
        query=_turned(site, query, [[query.of_head[h]] for h in order], across[0][asked]),
        key=_turned(site, key, new, across[0]),
        value=_turned(site, value, new, across[1]),
        output=torch.einsum("ohc,hdc->ohd", columns, across[1][asked]).to(weight.dtype),
        source_of=tuple(order),
    )


def _turned(site: HeadSite, side: Side, members: Sequence[Sequence[int]], by: Tensor) -> Part:
    """Means of heads after a turn; `by` has one for each member, or one for each head."""
    weight, bias = side.weight(site.program), side.bias(site.program)
    one_each = side.kind == "query"

    def mean(rows: Tensor) -> Tensor:
        found = [
            torch.stack([by[n if one_each else head] @ rows[head].double() for head in heads]).mean(
                0
            )
            for n, heads in enumerate(members)
        ]
        return torch.stack(found).to(rows.dtype)

    return Part(mean(weight), None if bias is None else mean(bias))


def divisors(site: HeadSite) -> list[int]:
    """Returns the numbers of key heads that merging in equal parts can leave, most first."""
    count = len(site.groups)
    sizes = {len(heads) for heads in site.groups}
    if len(sizes) != 1 or site.sides["value"].of_head != site.sides["key"].of_head:
        return []
    return [n for n in range(count - 1, 0, -1) if count % n == 0]
