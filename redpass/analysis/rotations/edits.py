"""The edits that turn a stream and leave some directions of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, fx

from redpass.analysis.linears import Linear, Linears
from redpass.analysis.rotations.bases import Basis, Fit, plain
from redpass.analysis.rotations.records import READS, WRITES, Crossing, Stream, Tie, Turn
from redpass.analysis.rotations.ties import turns_of
from redpass.analysis.widths.resizing import resized
from redpass.plan import Edit, Insert, Multiply, Ref, Replace, SetArgument, SetWeight, WeightRef
from redpass.program import Program

aten = torch.ops.aten

MIXED, APART = "mixed", "apart"


class Turning:
    """Writes the edits for one stream and one basis.

    Args:
        table: all linears.
        fits: output of a norm -> what its readers read; those not named read what is left.
        tied: what becomes of tied tables, `MIXED` or `APART` (whole ones are no ties any more).
    """

    def __init__(
        self,
        program: Program,
        stream: Stream,
        turned: Basis,
        table: Linears,
        fits: Mapping[str, Fit],
        tied: str,
    ) -> None:
        self.program, self.stream, self.basis, self.table = program, stream, turned, table
        self.norms = {norm.output: norm for norm in stream.norms}
        self.fits, self.tied = fits, tied
        self._units: dict[str, str] = {}
        self._stored: list[Edit] = []
        self._used = set(program.weights)
        # One tensor each, however many weights are multiplied by it.
        self._inwards, self._plain = turned.inwards, plain(turned)

    def edits(self) -> tuple[Edit, ...]:
        """All edits, in an order in which none undoes another."""
        shifts = [edit for turn in self._read_behind_norms() for edit in self._shift(turn)]
        turns = list(self._turns())
        after: list[Edit] = []
        for unit in self.stream.units:
            after += self._swap(unit.node, unit.weight, self._constant(unit.weight, unit.value))
        for crossing in self.stream.crossings:
            after += self._crossing(crossing)
        return (*self._stored, *self._sizes(), *shifts, *turns, *after)

    def _turns(self) -> Iterator[Edit]:
        done: set[tuple[str, int]] = set()
        # What reads comes first: its bias takes a shift up before it is turned itself.
        for turn in sorted(self.stream.turns, key=lambda turn: turn.by == WRITES):
            if turn.is_copied:
                yield from self._copied(turn)
            elif (turn.weight, turn.axis) not in done:
                done.add((turn.weight, turn.axis))
                yield self._multiplied(turn)
        for tie in self.stream.ties:
            yield from self._mixed(tie) if self.tied == MIXED else self._parted(tie)

    def _multiplied(self, turn: Turn) -> Multiply:
        matrix, scale = self.matrix(turn.by), self.gain(turn.by)
        if turn.gain:
            scale = self.program.weights[turn.gain].double().flatten()
        shift, linear = self.shift(turn.by), self.table.by_node.get(turn.node)
        if linear is None or not bool(shift.any()) or not self._takes(linear):
            return Multiply(turn.weight, turn.axis, matrix, scale)
        return Multiply(turn.weight, turn.axis, matrix, scale, linear.bias or "", shift)

    def _takes(self, linear: Linear) -> bool:
        """Whether the bias of a linear is there for it alone."""
        return linear.bias is not None and self.table.shared(linear.names) is None

    def _copied(self, turn: Turn) -> Iterator[Edit]:
        """A turned copy for one reader."""
        edit, old = self._multiplied(turn), self.program.weights[turn.weight]
        weight = old.double().movedim(turn.axis, -1)
        scaled = weight if edit.scale is None else weight * edit.scale
        value = (scaled @ edit.matrix).movedim(-1, turn.axis)
        yield from self._swap(
            turn.node, turn.weight, self._store(turn.weight, "turned", value, old.dtype)
        )

    def _read_behind_norms(self) -> list[Turn]:
        turns = [turn for turn in self.stream.turns if turn.by in self.norms]
        ties = self.stream.ties if self.tied == APART else ()
        return turns + [t for tie in ties for t in turns_of(tie) if t.by in self.norms]

    def _sizes(self) -> list[Edit]:
        stream, names = self.stream, set(self.stream.values)
        assert stream.couplings is not None
        assert stream.dimension is not None
        sizes = {stream.dimension: self.basis.width}
        nodes = (node for node in stream.couplings.flow.nodes if node.name in names)
        return [edit for node in nodes for edit in resized(node, stream.couplings, sizes)]

    def matrix(self, by: str) -> Tensor:
        """What an axis of a weight is multiplied by, behind its gain, `[d, k]`."""
        if by == WRITES:
            return self._inwards
        if by == READS:
            return self._plain.matrix
        return self.fits.get(by, self._plain).matrix

    def gain(self, by: str) -> Tensor | None:
        """The gain `[d]` of the norm that an axis is behind; None for none."""
        norm = self.norms.get(by)
        if norm is None or norm.weight is None:
            return None
        return self.program.weights[norm.weight].double().flatten() + norm.offset

    def shift(self, by: str) -> Tensor:
        """What the readers of a norm's result add to it, `[d]`, before their own weights."""
        if by not in self.norms:
            return torch.zeros(self.stream.width, dtype=torch.float64)
        found, gain = self.fits.get(by, self._plain).shift, self.gain(by)
        found = found if gain is None else found * gain
        bias = self.norms[by].bias
        return found if bias is None else found + self.program.weights[bias].double().flatten()

    def _whole(self, by: str) -> Tensor:
        gain = self.gain(by)
        return self.matrix(by) if gain is None else self.matrix(by) * gain[:, None]

    def _store(self, old: str, what: str, value: Tensor, dtype: torch.dtype) -> str:
        name, number = f"{old}_{what}", 2
        while name in self._used:
            name, number = f"{old}_{what}_{number}", number + 1
        self._used.add(name)
        self._stored.append(SetWeight(name, value.to(dtype).contiguous(), f"{old}, {what}"))
        return name

    def _constant(self, weight: str, value: float) -> str:
        if weight not in self._units:
            old = self.program.weights[weight]
            shape = [self.basis.width if size == self.stream.width else size for size in old.shape]
            filled = torch.full(shape, value, dtype=torch.float64)
            self._units[weight] = self._store(weight, "turned", filled, old.dtype)
        return self._units[weight]

    def _swap(self, node: str, old: str, new: str) -> Iterator[Edit]:
        for operand in self.program.nodes[node].all_input_nodes:
            if operand.op == "get_attr" and str(operand.target) == old:
                yield SetArgument(node, operand.name, WeightRef(new))

    def _shift(self, turn: Turn) -> Iterator[Edit]:
        """A reader's bias takes up what its input no longer holds."""
        linear, shift = self.table.by_node[turn.node], self.shift(turn.by)
        if not bool(shift.any()) or self._takes(linear):
            return
        old, dtype = linear.offset(self.program), self.program.weights[linear.weight].dtype
        added = linear.matrix(self.program).double() @ shift
        value = added if old is None else added + old.double()
        name = linear.bias or f"{linear.weight}_bias"
        bias = self._store(name, "shifted", value, dtype)
        if linear.bias:
            yield from self._swap(linear.node, linear.bias, bias)
            return
        node, summed = self.program.nodes[linear.node], f"{linear.node}_shifted"
        args = (Ref(linear.node), WeightRef(bias))
        yield Insert(summed, aten.add.Tensor, args, _behind(node))
        yield Replace(linear.node, summed)

    def _crossing(self, crossing: Crossing) -> Iterator[Edit]:
        """A product that takes a value into the stream's coordinates, or out of them."""
        node = self.program.nodes[crossing.node]
        matrix, dtype = self._whole(crossing.by), node.meta["val"].dtype
        comes_in = crossing.by == WRITES
        weight = self._store(crossing.node, "turn", matrix.T if comes_in else matrix, dtype)
        shift = self.shift(crossing.by)
        bias = self._store(crossing.node, "shift", shift, dtype) if bool(shift.any()) else None
        yield from _product(node, f"{crossing.node}_turned", weight, bias, crossing.users)

    def _mixed(self, tie: Tie) -> Iterator[Edit]:
        """One narrower table for both; what the head reads is mixed for it.

        The head is to give `E m` for `m = matrix y + shift` `[d]` and has `E R` only: the best it
        can do, over all words, is least squares in the metric `EᵀE`.
        """
        weight = self.program.weights[tie.weight]
        table = weight.double().movedim(tie.axis, -1)
        inwards = self._inwards
        metric = table.T @ table
        inner = inwards.T @ metric @ inwards
        back = torch.linalg.lstsq(inner, inwards.T @ metric, driver="gelsd").solution
        yield Multiply(tie.weight, tie.axis, inwards)
        matrix, shift = back @ self._whole(tie.norm), back @ self.shift(tie.norm)
        mixer = self._store(tie.weight, "mixer", matrix, weight.dtype)
        bias = self._store(tie.weight, "mixer_bias", shift, weight.dtype) if shift.any() else None
        for name, source in tie.heads:
            node = self.program.nodes[source]
            yield from _product(node, f"{source}_mixed", mixer, bias, (name,))

    def _parted(self, tie: Tie) -> Iterator[Edit]:
        """A table to look words up in, and one for the head."""
        for turn in turns_of(tie):
            if turn.by != WRITES:
                yield from self._copied(turn)
        yield Multiply(tie.weight, tie.axis, self._inwards)


def _product(
    node: fx.Node, name: str, weight: str, bias: str | None, users: tuple[str, ...]
) -> Iterator[Edit]:
    """A linear of a value that some of its users read in its place."""
    args = (Ref(node.name), WeightRef(weight), WeightRef(bias) if bias else None)
    yield Insert(name, aten.linear.default, args, _behind(node))
    for user in users:
        yield SetArgument(user, node.name, name)


def _behind(node: fx.Node) -> str:
    """The node to insert before so that `node` is computed and no input comes later."""
    after = node.next
    while after.op in ("placeholder", "get_attr"):
        after = after.next
    return str(after.name)
