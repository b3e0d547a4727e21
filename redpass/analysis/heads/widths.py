"""`head_widths`: how narrow the heads of each attention can be made, and what that costs.

What may be turned into other directions is told here: nothing but views, copies, casts, caches and
constant factors may stand between a projection and the core, or between the core and the output
projection. With rotary positions between queries, keys and scores, what may be left out are whole
planes, pairs of channels of one frequency (`rotated`).
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from redpass import ops
from redpass.analysis.heads.clover import Keys, Values, merged, observers
from redpass.analysis.heads.cuts import HeadCut, edits
from redpass.analysis.heads.planes import Planes, find_planes
from redpass.analysis.heads.rotated import RotatedKeys, rotated_observers
from redpass.analysis.heads.sites import HeadSite, head_sites
from redpass.analysis.heads.turns import Trial
from redpass.analysis.observers import Observer
from redpass.analysis.statistics import collect, portions
from redpass.facts import Facts
from redpass.plan import Edit
from redpass.program import Program

HARMLESS = frozenset(
    {"repeat_interleave", "index_select", "split", "split_with_sizes", "chunk",
     "unbind", "sym_size"}
)  # fmt: skip


@dataclass(frozen=True)
class Shapes:
    """What can be cut, told without data.

    Attributes:
        kinds: branch label -> `values`, `keys`, or both: what may have other directions.
        skips: (label, reason) of what cannot.
        planes: branch label -> what rotary positions turn, where queries and keys can be cut.
    """

    kinds: Mapping[str, tuple[str, ...]]
    skips: tuple[tuple[str, str], ...]
    planes: Mapping[str, Planes]

    def step(self, label: str, kind: str) -> int:
        """Returns what widths of a kind differ by: 2 where only whole pairs can go."""
        own = self.planes.get(label) if kind != "values" else None
        return 1 if own is None else own.step


@dataclass(frozen=True, eq=False)
class HeadWidths:
    """One attention with the statistics of its heads.

    Attributes:
        values: None where values cannot be cut; `keys` likewise, for queries and keys.
    """

    site: HeadSite
    values: Values | None
    keys: Keys | RotatedKeys | None
    tokens: int
    known: dict[tuple[str, str], tuple[Any, ...]] = field(default_factory=dict)

    def own(self, kind: str, basis: str) -> int:
        """The width that the weights of `values` or `keys` really have, over all heads."""
        found: int = max(1, *(each.own for each in self._bases(kind, basis)))
        return found

    def cut(
        self, kind: str, width: int, basis: str, *, refit: bool
    ) -> tuple[tuple[Edit, ...], float]:
        """Returns the edits and the predicted loss of a width.

        Args:
            kind: `values`, `keys`, or `heads` for both.

        Raises:
            Unfit: why the graph cannot have such heads.
        """
        cut, loss = HeadCut(), 0.0
        if kind != "keys" and self.values is not None:
            cut, loss = self.values.cut(self._bases("values", basis), width, refit=refit)
        if kind != "values" and self.keys is not None:
            narrow, more = self.keys.cut(self._bases("keys", basis), width, refit=refit)
            cut, loss = merged(cut, narrow), loss + more
        return edits(self.site, cut, "narrow"), loss

    def _bases(self, kind: str, basis: str) -> tuple[Any, ...]:
        if (kind, basis) not in self.known:
            source = self.values if kind == "values" else self.keys
            assert source is not None
            self.known[kind, basis] = source.bases(basis)
        return self.known[kind, basis]


def head_shapes(program: Program, facts: Facts) -> Shapes:
    """Finds which heads may be turned into other directions."""
    del program
    found = facts.get(head_sites)
    kinds: dict[str, tuple[str, ...]] = {}
    planes: dict[str, Planes] = {}
    skips = [*found.reasons.items()]
    for label, site in found.found.items():
        own = find_planes(site, facts) if site.attention.rotary is not None else None
        reasons = {"values": _values_stay(site), "keys": _keys_stay(site, own)}
        if isinstance(own, Planes) and not reasons["keys"]:
            planes[label] = own
        kinds[label] = tuple(kind for kind, reason in reasons.items() if not reason)
        skips += [(f"{label}.{kind}", reason) for kind, reason in reasons.items() if reason]
    return Shapes(kinds, tuple(skips), planes)


def head_widths(program: Program, facts: Facts) -> Mapping[str, HeadWidths]:
    """Measures the heads of every attention that can be cut.

    Raises:
        DataError: no calibration data, or values that are NaN or infinite.
    """
    shapes, sites = facts.get(head_shapes), facts.get(head_sites).found
    wanted = {
        label: _observers(sites[label], kinds, shapes.planes.get(label))
        for label, kinds in shapes.kinds.items()
        if kinds
    }
    found: dict[str, HeadWidths] = {}
    trial = Trial(program, facts)
    for group in portions(program, wanted):
        asked = [observer for label in group for observer in wanted[label]]
        sums = collect(program, asked, facts.data())
        for label in group:
            site, kinds = sites[label], shapes.kinds[label]
            values = Values(program, facts, site, sums) if "values" in kinds else None
            keys = None
            if "keys" in kinds:
                keys = trial.keys(site, sums, shapes.planes.get(label))
            tokens = sums.tokens[asked[0]]
            found[label] = HeadWidths(site, values, keys, tokens)
    return found


def _observers(site: HeadSite, kinds: Sequence[str], planes: Planes | None) -> list[Observer]:
    rotated = rotated_observers(site, planes) if planes is not None and "keys" in kinds else []
    return [*observers(site), *rotated]


def _values_stay(site: HeadSite) -> str:
    flow = site.flow
    behind = flow.between(site.core.output, flow.program.nodes[site.output.input])
    inside = site.sides["value"].operand.nodes | {site.sides["value"].node}
    return _turned_by([*inside, *behind, flow.program.nodes[site.output.input]], site)


def _keys_stay(site: HeadSite, planes: Planes | str | None) -> str:
    attention = site.attention
    if isinstance(planes, str):
        return planes
    if planes is None and (attention.query_norm or attention.key_norm):
        return "a norm stands between the projections of queries and keys and the scores"
    if attention.scale is None:
        return "the scale of its scores is no constant"
    if site.sides["query"].heads != site.heads:
        return "its heads share queries"
    if planes is not None:
        return ""
    query, key = site.sides["query"], site.sides["key"]
    nodes = query.operand.nodes | key.operand.nodes | {query.node, key.node}
    return _turned_by(nodes, site)


def _turned_by(nodes: Iterable[fx.Node], site: HeadSite) -> str:
    """What does not let directions through, in words."""
    guilty = sorted(
        (n for n in nodes if not _lets_through(n, site)), key=site.flow.order.__getitem__
    )
    return f"{guilty[0].name} works on single channels" if guilty else ""


def _lets_through(node: fx.Node, site: HeadSite) -> bool:
    if node.op != "call_function" or ops.is_size(node) or ops.is_view(node):
        return True
    if node.target is operator.getitem:
        return True
    known = (*ops.RESHAPES, *ops.CASTS, *ops.COPIES, *ops.DROPOUTS, *ops.JOINS, *HARMLESS)
    if ops.is_call(node, *known) or node is site.core.output:
        return True
    if node.name in {side.projection.output for side in site.sides.values()}:
        return True
    if not ops.is_call(node, "mul", "div"):
        return False
    return all(_is_factor(operand, site) for operand in _others(node, site))


def _others(node: fx.Node, site: HeadSite) -> Iterator[object]:
    """The operands of a product but for the first one that depends on an input."""
    live = [a for a in node.args[:2] if site.flow.is_live_float(a)]
    yield from (a for a in node.args[:2] if not live or a is not live[0])


def _is_factor(operand: object, site: HeadSite) -> bool:
    return not isinstance(operand, fx.Node) or site.flow.scalar(operand) is not None
