"""`cache_sites`: the keys and values that attention keeps from call to call, and where they stand.

    x -> linear -> [norm, rotation] -> new ─┐
                                     past ──┴ cat = join -> [repeat heads] -> attention
                                              └─> the next call's past

What is kept can be made smaller where `join` is read by one attention and the cache alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import sympy
from torch import fx

from redpass import ops
from redpass.analysis.flow import Flow
from redpass.analysis.heads.sites import HeadSite, Side, head_sites
from redpass.analysis.records import StatePair
from redpass.facts import Facts
from redpass.program import Program

NO_CACHE = "the model keeps no keys and values from call to call"


@dataclass(frozen=True, eq=False)
class CacheSide:
    """The keys, or the values, of one attention.

    Attributes:
        site: the attention.
        side: the projection, and the way from it to the attention.
        state: ports of the cache.
        past: what is given, `[batch, heads, past, width]`.
        new: what a call adds, `[batch, heads, seq, width]`.
        join: both, along axis 2.
        split: the first value with an axis for heads, `[batch, seq, heads, width]` or as `new`.
        way: nodes from `split` (not in it) to `new` (in it), in order.
    """

    site: HeadSite
    side: Side
    state: StatePair
    past: fx.Node
    new: fx.Node
    join: fx.Node
    split: fx.Node
    way: tuple[fx.Node, ...]

    @property
    def heads(self) -> int:
        """Heads that are kept."""
        return int(self.new.meta["val"].shape[1])

    @property
    def width(self) -> int:
        """Numbers a position of one head."""
        return int(self.new.meta["val"].shape[3])

    @property
    def seq(self) -> sympy.Expr:
        """How many positions a call adds."""
        return ops.expression(self.new.meta["val"].shape[2])

    @property
    def past_length(self) -> sympy.Expr:
        """How many positions are given."""
        return ops.expression(self.past.meta["val"].shape[2])

    @property
    def is_moved_only(self) -> bool:
        """Whether what is kept is what the projection gives: no norm or rotation between."""
        return self.is_split_plain and all(map(is_move, self.way))

    @property
    def is_split_plain(self) -> bool:
        """Whether `split` is what the projection gives."""
        flow = self.site.flow
        made = flow.program.nodes[self.side.projection.output]
        return all(map(is_move, flow.between(made, self.split)))

    def group_of_reader(self, size: int) -> tuple[int, ...]:
        """Which group of `size` heads each head that the attention is given belongs to."""
        count = int(self.operand.meta["val"].shape[1])
        of_head = self.side.of_head
        return tuple(of_head[i * len(of_head) // count] // size for i in range(count))

    @property
    def operand(self) -> fx.Node:
        """What the attention reads."""
        return self.side.node


@dataclass(frozen=True)
class CacheSites:
    """What is kept, by branch label and kind (`key`, `value`); a text is why it stays as it is."""

    found: Mapping[tuple[str, str], CacheSide | str]


def cache_sites(program: Program, facts: Facts) -> CacheSites:
    """Finds the kept keys and values of every attention."""
    del program
    known = facts.get(head_sites)
    found: dict[tuple[str, str], CacheSide | str] = {}
    for label in [*known.found, *known.reasons]:
        for kind in ("key", "value"):
            site = known.found.get(label)
            found[label, kind] = known.reasons[label] if site is None else _side(site, kind)
    return CacheSites(found)


def _side(site: HeadSite, kind: str) -> CacheSide | str:
    side, program = site.sides[kind], site.program
    states = {program.input_node(a): (a, b) for a, b in program.signature.state}
    pasts = [node for node in side.operand.nodes if node in states]
    if len(pasts) != 1:
        return NO_CACHE if not pasts else "several values that are kept make it"
    past = pasts[0]
    pair = states[past]
    readers = [user for user in past.users if not ops.is_size(user)]
    join = readers[0] if len(readers) == 1 else None
    if join is None or not ops.is_call(join, *ops.JOINS) or _parts(join)[:1] != [past]:
        return "what is kept is not joined to what is new in the usual way"
    if len(_parts(join)) != 2 or ops.argument(join, "dim") not in (2, -2):
        return "what is kept is not joined to what is new along the positions"
    if program.output_value(pair[1]) is not join:
        return "what is kept for the next call is not what the attention reads"
    return _checked(site, side, pair, past, join)


def _parts(join: fx.Node) -> list[fx.Node]:
    return list(ops.argument(join, "tensors"))


def _checked(
    site: HeadSite, side: Side, pair: StatePair, past: fx.Node, join: fx.Node
) -> CacheSide | str:
    new = _parts(join)[1]
    shape = [ops.expression(size) for size in new.meta["val"].shape]
    if len(shape) != 4 or side.place(new, side.features) != (1, 3):
        return "which numbers that are kept are which head's could not be told"
    if isinstance(shape[2], int):
        return "the number of new positions is fixed"
    if other := _other_reader(site, side, join):
        return f"'{other}' reads what is kept, too"
    split = _split(site.flow, side)
    if split is None:
        return "no value before it has an axis for heads and one for positions"
    way = (new,) if new is split else (*site.flow.between(split, new),)
    way = tuple(sorted((n for n in way if n is not split), key=site.flow.order.__getitem__))
    return CacheSide(site, side, pair, past, new, join, split, way)


def _other_reader(site: HeadSite, side: Side, join: fx.Node) -> str:
    """A node that reads what is kept, is on no way to the attention, and is not the output."""
    inside = {*side.operand.nodes, *site.core.nodes}
    todo = [join]
    while todo:
        node = todo.pop()
        for user in node.users:
            if user in inside or (user.op == "output" and node is join):
                todo += [user] if user in side.operand.nodes else []
            elif not ops.is_size(user):
                return user.name
    return ""


def _split(flow: Flow, side: Side) -> fx.Node | None:
    known = sorted(side.operand.known, key=flow.order.__getitem__)
    for node in known:
        value = node.meta.get("val")
        if getattr(value, "dim", int)() == 4 and side.place(node, side.features) in (
            (1, 3),
            (2, 3),
        ):
            return node
    return None


def is_move(node: fx.Node) -> bool:
    """Whether the node moves, picks or joins numbers and computes none."""
    name = getattr(node.target, "__name__", "")
    return (
        ops.is_view(node)
        or name == "getitem"
        or ops.is_call(node, *ops.COPIES, *ops.DROPOUTS, *ops.JOINS)
    )
