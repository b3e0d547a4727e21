"""Where heads meet the core: repeated or gathered anew when other ones are read there."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from redpass import ops
from redpass.analysis.heads.axes import Factor, Unfit, new_node
from redpass.analysis.heads.forms import Forms
from redpass.analysis.heads.planes import Planes
from redpass.analysis.heads.sites import KINDS, HeadSite, Side
from redpass.plan import Edit, Insert, Ref, SetArgument, SetWeight, WeightRef

aten = torch.ops.aten


@dataclass(frozen=True, eq=False)
class Part:
    """Heads of queries, keys or values as matrices.

    Attributes:
        weight: `[heads, width, ins]`.
        bias: `[heads, width]`; None where the projection has none.
        kept: `[heads, width]`, rising: which old channels' places the new ones take, where ops
            between here and the core work on single channels; None where none does.
        gain: `[heads, width]`, factors for the gain of the norm behind; None for none.
    """

    weight: Tensor
    bias: Tensor | None = None
    kept: Tensor | None = None
    gain: Tensor | None = None


@dataclass(frozen=True, eq=False)
class HeadCut:
    """What heads an attention has from now on; None and () leave as it was.

    Attributes:
        query: heads of queries; `key` and `value` likewise.
        output: the output projection, `[outs, heads of the core, value width]`.
        output_bias: its bias, `[outs]`, for a projection that has one.
        query_of: for each head of the core, which query head it reads; in order where empty.
        key_of: which key head; spread evenly in order where empty, as always for values.
        value_of: which value head.
        source_of: which old head each head of the core takes its mask from.
        planes: what rotary positions turn, where queries and keys keep some channels only.
    """

    query: Part | None = None
    key: Part | None = None
    value: Part | None = None
    output: Tensor | None = None
    output_bias: Tensor | None = None
    query_of: tuple[int, ...] = ()
    key_of: tuple[int, ...] = ()
    value_of: tuple[int, ...] = ()
    source_of: tuple[int, ...] = ()
    planes: Planes | None = None


def spread(count: int, heads: int) -> tuple[int, ...]:
    """Returns which of `count` heads each of `heads` readers reads, evenly and in order."""
    return tuple(reader * count // heads for reader in range(heads))


@dataclass(eq=False)
class Job:
    """One attention while it gets other heads.

    Attributes:
        what: ends the names of new weights and nodes.
        forms: the sizes of its values, as far as they were followed.
        heads: the heads of the core.
        made: the edits, beside those of `forms`.
        skipped: nodes that nobody reads any more.
        tables: what was taken of tables of rotary positions -> its node.
    """

    site: HeadSite
    cut: HeadCut
    what: str
    forms: Forms = field(init=False)
    heads: Factor = field(init=False)
    made: list[Edit] = field(default_factory=list)
    skipped: set[fx.Node] = field(default_factory=set)
    tables: dict[tuple[Any, ...], str] = field(default_factory=dict)
    _places: dict[tuple[int, ...], WeightRef] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.forms = Forms(self.site.program)
        self.parts: dict[str, Part | None] = {kind: getattr(self.cut, kind) for kind in KINDS}
        known = self.cut.query_of or self.cut.source_of
        queries = self.parts["query"]
        new = len(known) or (self.site.heads if queries is None else len(queries.weight))
        self.heads = Factor("heads", self.site.heads, new)

    def count(self, kind: str) -> int:
        """Returns how many distinct heads a side has from now on."""
        new = self.parts[kind]
        return self.site.sides[kind].heads if new is None else len(new.weight)

    def width(self, kind: str) -> int:
        """Returns how wide they are from now on."""
        new = self.parts[kind]
        return self.site.sides[kind].width if new is None else int(new.weight.shape[1])

    def of(self, side: Side) -> tuple[int, ...]:
        """Returns which of its heads each head of the core reads from now on."""
        count, told = self.count(side.kind), getattr(self.cut, f"{side.kind}_of")
        if not told and self.parts[side.kind] is None and self.heads.new == self.heads.old:
            return side.of_head
        found: tuple[int, ...] = told or spread(count, self.heads.new)
        if len(found) != self.heads.new or not set(found) <= set(range(count)):
            raise Unfit(f"{self.heads.new} heads cannot read {side.kind} heads {found} of {count}")
        if not told and self.heads.new % count:
            raise Unfit(f"{self.heads.new} heads cannot share {count} {side.kind} heads evenly")
        return found

    def factor(self, side: Side) -> Factor:
        """Returns what the number of a side's distinct heads becomes."""
        count = self.count(side.kind)
        is_one_each = self.of(side) == tuple(range(count)) and count == self.heads.new
        if side.heads == self.site.heads and is_one_each:
            return self.heads
        return Factor(f"heads of {side.kind}", side.heads, count)

    def is_grouped(self) -> bool:
        """Whether the core shares key and value heads by itself, and can go on doing so."""
        core = self.site.core
        if not ops.is_call(core.node, "scaled_dot_product_attention"):
            return False
        counts = [self.count(kind) for kind in ("key", "value")]
        evenly = spread(counts[0], self.heads.new)
        is_even = all(self.of(self.site.sides[kind]) == evenly for kind in ("key", "value"))
        return bool(ops.argument(core.node, "enable_gqa")) and is_even and counts[0] == counts[1]

    def loses_groups(self, side: Side) -> bool:
        """Whether the core shared a side's heads by itself, and cannot go on doing so."""
        core = self.site.core
        is_sdpa = ops.is_call(core.node, "scaled_dot_product_attention")
        shared = is_sdpa and side.kind != "query" and ops.argument(core.node, "enable_gqa")
        return bool(shared) and not self.is_grouped()

    def index(self, what: str, of: tuple[int, ...]) -> WeightRef:
        """Returns a new weight that holds places of heads."""
        name = f"{self.site.label}.{what}".replace("/", ".")
        taken, number = name, 2
        while taken in self.site.program.weights:
            taken, number = f"{name}_{number}", number + 1
        self.made.append(SetWeight(taken, torch.tensor(of), "places of heads"))
        return WeightRef(taken)

    def places_of(self, channels: tuple[int, ...]) -> WeightRef:
        """Returns a weight that holds places of channels, one for all tables that are cut alike."""
        if channels not in self._places:
            self._places[channels] = self.index(f"channels_{len(self._places)}", channels)
        return self._places[channels]


def join(job: Job, side: Side) -> None:
    """Follows a side from its projection to the core, and gives the core its heads anew.

    Raises:
        Unfit: an op between the two does not let the change through.
    """
    _Join(job, side).run()


@dataclass(eq=False)
class _Join:
    job: Job
    side: Side

    def run(self) -> None:
        job, side = self.job, self.side
        nodes = side.operand.nodes | {side.node}
        is_same = job.parts[side.kind] is None and job.heads.new == job.heads.old
        if is_same and job.of(side) == side.of_head and not job.loses_groups(side):
            job.forms.run(nodes - job.skipped)
            return
        narrow, wide, axis = self._borders()
        job.skipped |= _between(narrow, wide) if wide is not None else set()
        behind = job.site.flow.ancestors([side.node], job.site.flow.order[narrow]) - job.skipped
        job.forms.run(nodes - behind - job.skipped)
        form = list(job.forms.of(narrow))
        form[axis] = (job.heads,)
        self._reconnect(narrow, wide, axis)
        source = narrow if wide is None else wide
        job.forms.known[source] = tuple(form)
        job.forms.run(nodes & (behind - {source}))

    def _borders(self) -> tuple[fx.Node, fx.Node | None, int]:
        """The last value with each head once, the first with each as often as read, and the axis.

        The second is None where the core reads the first.
        """
        side, flow = self.side, self.job.site.flow
        nodes = sorted(side.operand.nodes | {side.node}, key=flow.order.__getitem__)
        wide = None
        if side.heads != self.job.site.heads:
            full = side.features[list(side.of_head)]
            wide = next((n for n in nodes if side.place(n, full, partial=True)), None)
        if wide is not None:
            above, rank = flow.ancestors([wide]) - {wide}, wide.meta["val"].dim()
            nodes = [
                n for n in nodes if n in above and getattr(n.meta["val"], "dim", int)() == rank
            ]
        for node in reversed(nodes):
            if place := side.place(node, side.features, partial=True):
                return node, wide, place[0]
        raise Unfit(f"no value holds the {side.kind} heads side by side")

    def _reconnect(self, narrow: fx.Node, wide: fx.Node | None, axis: int) -> None:
        """Lets what read the heads as they were repeated read them as they are from now on."""
        job, core, source = self.job, self.job.site.core, wide or narrow
        inside = self.side.operand.nodes | core.nodes | {core.node, core.output, self.side.node}
        readers = [user for user in source.users if user in inside and not ops.is_size(user)]
        name = self._repeated(narrow, axis, min(readers, key=job.site.flow.order.__getitem__))
        if name != source.name:
            job.made += [SetArgument(user.name, source.name, name) for user in readers]

    def _repeated(self, narrow: fx.Node, axis: int, before: fx.Node) -> str:
        """The name of the value with a head for each of the core's."""
        job, of = self.job, self.job.of(self.side)
        count = job.count(self.side.kind)
        if of == tuple(range(count)) or job.is_grouped():
            return narrow.name
        name = new_node(job.site.program, f"{narrow.name}_{job.what}")
        call: Any = aten.repeat_interleave.self_int
        arguments: tuple[Any, ...] = (Ref(narrow.name), len(of) // count, axis)
        if of != spread(count, len(of)) or len(of) % count:
            call = aten.index_select.default
            arguments = (Ref(narrow.name), axis, job.index(f"{self.side.kind}_of", of))
        job.made.append(Insert(name, call, arguments, before.name))
        return name


def _rank(node: fx.Node) -> int:
    value = node.meta["val"]
    return value.dim() if isinstance(value, Tensor) else -1


def _between(narrow: fx.Node, wide: fx.Node) -> set[fx.Node]:
    """The nodes that repeat heads, from `narrow` to `wide`, without both."""
    found: set[fx.Node] = set()
    todo = [wide]
    while todo:
        for operand in todo.pop().all_input_nodes:
            is_new = operand is not narrow and operand not in found
            if is_new and operand.op == "call_function" and not ops.is_size(operand):
                found.add(operand)
                todo.append(operand)
    return found
