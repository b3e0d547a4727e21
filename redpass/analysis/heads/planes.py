"""`find_planes`: which channels of queries and keys rotary positions turn together.

Whatever the layout (`c` with `c + d / 2`, or neighbours), a rotation adds two
products with tables: one of a channel with a cosine, one of its partner with a sine. The indices
that `provenance` carries through the graph tell which channel meets which. Two channels of one
frequency are a plane. What commutes with all rotations is one complex factor for each plane; what
is not rotated (partial rotary positions) may be turned in any way. Behind a norm of heads only
choosing whole planes is left, and one factor each in the norm's gain.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from redpass import ops
from redpass.analysis.attention import SHIFT
from redpass.analysis.heads.sites import HeadSite, Side
from redpass.analysis.provenance import UNKNOWN
from redpass.analysis.records import Norm
from redpass.analysis.rotary import rotations
from redpass.analysis.structure import structure
from redpass.analysis.tokens import Tokens
from redpass.facts import Facts

MASK = (1 << SHIFT) - 1


@dataclass(frozen=True)
class Planes:
    """The channels of an attention's queries and keys.

    Attributes:
        first: one channel of each plane, rising; `second` its partner.
        rest: channels that are not rotated.
        points: kind (`query`, `key`) -> the node whose value has all channels as they are compared.
        norms: kind -> the norm of its heads, of those that have one.
    """

    first: tuple[int, ...]
    second: tuple[int, ...]
    rest: tuple[int, ...]
    points: Mapping[str, str]
    norms: Mapping[str, Norm]

    @property
    def step(self) -> int:
        """What widths are multiples of."""
        return 2 if self.norms or not self.rest else 1

    @property
    def least(self) -> int:
        """The narrowest heads: one plane, and one of the other channels where there are some."""
        return 2 + bool(self.rest)


def find_planes(site: HeadSite, facts: Facts) -> Planes | str:
    """Returns the planes of an attention with rotary positions, or why none can be left out."""
    sides = [site.sides[kind] for kind in ("query", "key")]
    found = [_partners(site, side) for side in sides]
    if None in found or found[0] != found[1]:
        return "which channels its rotary positions turn together could not be told"
    partners = found[0] or ()
    points = {side.kind: _point(site, side) for side in sides}
    if None in points.values():
        return "no value holds its rotated heads side by side"
    widths = [Tokens(site.program).width(node.name) for node in points.values() if node]
    if widths != [side.heads * side.width for side in sides]:
        return "which axis of its rotated heads holds positions could not be told"
    norms = _norms(site, facts, sides[0].width)
    if isinstance(norms, str):
        return norms
    rest = tuple(c for c, other in enumerate(partners) if other < 0)
    if norms and rest:
        return "a norm stands before rotary positions that turn some of its channels only"
    first = tuple(c for c, other in enumerate(partners) if other > c)
    return Planes(
        first, tuple(partners[c] for c in first), rest,
        {kind: node.name for kind, node in points.items() if node is not None}, norms,
    )  # fmt: skip


def _norms(site: HeadSite, facts: Facts, width: int) -> dict[str, Norm] | str:
    named = {"query": site.attention.query_norm, "key": site.attention.key_norm}
    by_output = {norm.output: norm for norm in facts.get(structure).norms}
    found = {kind: by_output[name] for kind, name in named.items() if name is not None}
    for norm in found.values():
        if norm.kind != "rms" or norm.weight is None or norm.bias is not None:
            return f"a norm of the kind '{norm.kind}' mixes its channels before they are rotated"
        if site.program.weights[norm.weight].numel() != width:
            return "a norm over all heads together stands before its rotary positions"
    return found


def _partners(site: HeadSite, side: Side) -> tuple[int, ...] | None:
    """For each channel of a head the one it is turned with, -1 for none; None if heads differ."""
    partner = torch.full((side.linear.outs,), -1)
    for node, _ in rotations(site.flow, side.operand.known):
        for left, right in _met(site, side.operand.known, node):
            both = (left != right) & (left != UNKNOWN) & (right != UNKNOWN)
            one, other = (x[both] & MASK for x in (left, right))
            for a, b in ((one, other), (other, one)):
                if bool(((partner[a] != -1) & (partner[a] != b)).any()):
                    return None
                partner[a] = b
    places = torch.full((side.linear.outs + 1,), -1)
    local = torch.arange(side.width)
    heads = []
    for features in side.features:
        places[features] = local
        heads.append(tuple(places[partner[features]].tolist()))
        places[features] = -1
    is_own = bool((partner[side.features] == -1).logical_not().any())
    return heads[0] if is_own and len(set(heads)) == 1 else None


def _met(
    site: HeadSite, known: Mapping[fx.Node, Any], node: fx.Node
) -> list[tuple[Tensor, Tensor]]:
    """Pairs of index tensors whose channels a rotation adds up, place by place."""
    if ops.is_call(node, "view_as_real"):
        held = known[node]
        return [(held[..., 0].flatten(), held[..., 1].flatten())]
    inside = []
    for product in node.args[:2]:
        assert isinstance(product, fx.Node)
        factors: Any = site.flow.peel(product).args[:2]
        inside += [known[factor] for factor in factors if factor in known]
    left, right = torch.broadcast_tensors(*inside)
    return [(left.flatten(), right.flatten())]


def _point(site: HeadSite, side: Side) -> fx.Node | None:
    """The last value with each head once, behind the rotation and before a cache."""
    found = None
    last = site.attention.rotary.query if site.attention.rotary else ""
    if side.kind == "key" and site.attention.rotary is not None:
        last = site.attention.rotary.key or ""
    start = site.flow.order.get(site.program.nodes.get(last), -1)  # type: ignore[arg-type]
    for node in sorted(side.operand.known, key=site.flow.order.__getitem__):
        held = side.operand.known[node]
        if start < 0 or site.flow.order[node] < start or not isinstance(held, Tensor):
            continue
        whole = held.dim() == 4 == node.meta["val"].dim() and not bool((held == UNKNOWN).any())
        if whole and side.place(node, side.features) in ((1, 3), (2, 3)):
            found = node
    return found
