"""`streams`: residual streams that can be turned, with everything that writes and reads them.

A value of the stream may be turned by any matrix if all that it is made from is turned alike. So
from one value on, sums, moves and scales are followed both ways: upwards to what writes (linears,
convolutions, tables, constants), downwards to what reads (norms and the linears behind them).
Whatever is neither gets a product of its own at the border; it is never guessed at.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from torch import fx

from redpass import ops
from redpass.analysis.axes import Dimension, resolve
from redpass.analysis.couplings import Couplings
from redpass.analysis.flow import Flow
from redpass.analysis.linears import linears
from redpass.analysis.records import Norm
from redpass.analysis.rotations.gains import units
from redpass.analysis.rotations.records import (
    READS,
    WRITES,
    Crossing,
    Stream,
    StreamNorm,
    Turn,
    Unit,
)
from redpass.analysis.rotations.roles import Roles
from redpass.analysis.rotations.ties import settle
from redpass.analysis.structure import structure
from redpass.facts import Facts
from redpass.program import Program

NO_NORM = "no layer norm or RMS norm reads it"


class ObstacleError(Exception):
    """Why a stream cannot be turned, in words that name the node."""


def streams(program: Program, facts: Facts) -> tuple[Stream, ...]:
    """Finds the residual streams, one for each width that a stream has on its way."""
    found: list[Stream] = []
    seen: set[str] = set()
    for names in facts.get(structure).streams:
        if why := _post_norm(facts, names):
            label = f"stream.{len(found) + 1}" if found else "stream"
            found.append(Stream(label, 0, obstacle=why))
            continue
        for name in names:
            if name not in seen:
                label = f"stream.{len(found) + 1}" if found else "stream"
                stream = _stream(program, facts, name, label)
                seen |= {name, *stream.values, *(c.node for c in stream.crossings)}
                found.append(stream)
                if stream.obstacle:
                    seen |= set(names)
    return tuple(found)


def _post_norm(facts: Facts, names: tuple[str, ...]) -> str:
    for branch in facts.get(structure).branches:
        if branch.form == "post-norm" and branch.after in names:
            return _between(facts.program.nodes[branch.after])
    return ""


def _stream(program: Program, facts: Facts, name: str, label: str) -> Stream:
    couplings = Couplings(Flow(program))  # walks merge nothing, but plans keep their own
    node = program.nodes[name]
    dimension = _dimension(couplings, node)
    if dimension is None:
        return Stream(label, 0, obstacle=f"which axis of {name} holds its features is not clear")
    walk = _Walk(facts, couplings, dimension)
    try:
        return walk.stream(node, label)
    except ObstacleError as obstacle:
        return Stream(label, dimension.size, obstacle=str(obstacle))


def _dimension(couplings: Couplings, node: fx.Node) -> Dimension | None:
    axes = couplings.axes.get(node)
    last = resolve(axes[-1]) if isinstance(axes, list) and axes else ()
    return last[0].dimension if len(last) == 1 and last[0].block == 1 else None


@dataclass(eq=False)
class _Walk:
    """Follows one stream; `origin` says of each turned value whose coordinates it has."""

    facts: Facts
    couplings: Couplings
    dimension: Dimension
    origin: dict[fx.Node, str] = field(default_factory=dict)
    entries: dict[fx.Node, None] = field(default_factory=dict)
    exits: dict[fx.Node, dict[str, None]] = field(default_factory=dict)
    turns: dict[Turn, None] = field(default_factory=dict)
    gains: list[tuple[fx.Node, str]] = field(default_factory=list)
    norms: dict[str, tuple[Norm, fx.Node]] = field(default_factory=dict)
    todo: list[tuple[fx.Node, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.program = self.facts.program
        self.linears = self.facts.get(linears).by_node
        self.roles = Roles(self.couplings, self.dimension, self.linears)
        self.inner: dict[str, Norm] = {}
        for norm in self.facts.get(structure).norms:
            if norm.kind in ("layer", "rms") and norm.eps is not None:
                for name in norm.nodes:
                    if not self.roles.flow.is_no_op(self.program.nodes[name]):
                        self.inner[name] = norm

    def stream(self, first: fx.Node, label: str) -> Stream:
        """Follows the stream from one of its values; raises `ObstacleError`."""
        self.todo.append((first, ""))
        if not self._can_join(first):
            self.todo += [(u, "") for u in first.users if first in (self.roles.operands(u) or ())]
            for user in first.users:
                if user.name in self.inner:
                    self._norm_at(self.inner[user.name], first)
        while self.todo:
            self._join(*self.todo.pop())
        if not self.norms:
            raise ObstacleError(NO_NORM)
        inside = {n for norm, _ in self.norms.values() for n in norm.nodes}
        inside |= {node.name for node in self.origin}
        order = [node.name for node in self.couplings.flow.nodes]
        found = Stream(
            label,
            self.dimension.size,
            values=tuple(name for name in order if name in inside),
            turns=tuple(self.turns),
            units=tuple(self._units()),
            crossings=tuple(self._crossings(inside)),
            dimension=self.dimension,
            couplings=self.couplings,
        )
        found = settle(self.program, found)
        names = [name for name in order if name in self.norms]
        return replace(found, norms=tuple(self._norm(found, *self.norms[n]) for n in names))

    def _can_join(self, node: fx.Node) -> bool:
        if node.name in self.inner:
            return False
        is_written = next(self.roles.writes(node), None) is not None
        return is_written or bool(self.roles.operands(node) or self.roles.gain(node))

    def _join(self, node: fx.Node, gain: str) -> None:
        """Takes a value into the stream: what writes it, or what it is made from."""
        if node in self.origin:
            if self.origin[node] != WRITES:
                raise ObstacleError(_between(node))
            return
        turns = list(self.roles.writes(node, gain))
        operands = None if turns or node.name in self.inner else self.roles.operands(node)
        scaled = None if turns or operands or node.name in self.inner else self.roles.gain(node)
        if scaled is not None and not gain:
            self.gains.append((node, str(scaled[1].target)))
            self.todo.append((scaled[0], str(scaled[1].target)))
        elif operands and not any(self._is_misplaced(operand) for operand in operands):
            self._join_all(node, operands, gain)
        elif not turns:
            self._enter(node, gain)
            return
        self.turns.update(dict.fromkeys(turns))
        self._mark(node, WRITES)

    def _join_all(self, node: fx.Node, operands: list[fx.Node], gain: str) -> None:
        for operand in operands:
            axis = self.roles.axis(operand)
            if operand.op == "get_attr" and axis is not None:
                self.turns[Turn(str(operand.target), node.name, axis, WRITES, gain)] = None
            else:
                self.todo.append((operand, gain))

    def _is_misplaced(self, node: fx.Node) -> bool:
        """Whether a value would need a product at the border along another axis than the last."""
        known = node in self.origin or node.op == "get_attr" or self.roles.is_last(node)
        return not (known or next(self.roles.writes(node), None) or self.roles.operands(node))

    def _enter(self, node: fx.Node, gain: str) -> None:
        if gain or not self.roles.is_last(node):
            raise ObstacleError(
                f"{node.name} is not understood, and its features are not its last axis"
            )
        if node.name in self.norms:
            raise ObstacleError(_between(node))
        self.entries[node] = None

    def _mark(self, node: fx.Node, by: str) -> None:
        """Notes that a value is turned, and looks at all that read it."""
        if node in self.entries or self.origin.get(node, by) != by:
            raise ObstacleError(_between(node))
        if node in self.origin:
            return
        self.origin[node] = by
        for user in node.users:
            # A linear that is turned as a writer may read the stream as well.
            is_done = user in self.origin and user.name not in self.linears
            if not ops.is_size(user) and not is_done:
                self._read(node, user, by)

    def _read(self, node: fx.Node, user: fx.Node, by: str) -> None:
        norm, linear = self.inner.get(user.name), self.linears.get(user.name)
        if norm is not None and by == WRITES:
            self._norm_at(norm, node)
        elif norm is None and by == WRITES and node in (self.roles.operands(user) or ()):
            self.todo.append((user, ""))
        elif norm is None and by != WRITES and self.roles.moved(user) is node:
            self._mark(user, by)
        elif linear is not None and linear.input == node.name and self.roles.is_last(node):
            met = READS if by == WRITES else by
            self.turns[Turn(linear.weight, user.name, 1 - int(linear.transposed), met)] = None
        elif not self.roles.is_last(node):
            raise ObstacleError(f"{user.name}, which reads {node.name}, is not understood")
        else:
            self.exits.setdefault(node, {})[user.name] = None

    def _norm_at(self, norm: Norm, source: fx.Node) -> None:
        if norm.output in self.norms:
            return
        self.norms[norm.output] = norm, source
        self._mark(self.program.nodes[norm.output], norm.output)

    def _units(self) -> Iterator[Unit]:
        for node, weight in self.gains:
            yield Unit(node.name, weight, 1.0)
        for norm, _ in self.norms.values():
            inside = [self.program.nodes[name] for name in norm.nodes]
            members = [n for n in inside if n not in self.origin or n.name == norm.output]
            found, why = units(self.roles, norm, members, {*self.origin, *self.entries})
            if why:
                raise ObstacleError(why)
            yield from found

    def _crossings(self, inside: set[str]) -> Iterator[Crossing]:
        for node in self.entries:
            users = tuple(user.name for user in node.users if user.name in inside)
            yield Crossing(node.name, users, WRITES)
        for node, names in self.exits.items():
            by = self.origin[node]
            yield Crossing(node.name, tuple(names), READS if by == WRITES else by)

    def _norm(self, found: Stream, norm: Norm, source: fx.Node) -> StreamNorm:
        readers = [t.node for t in found.turns if t.by == norm.output]
        biases = [self.linears[name].bias for name in readers]
        return StreamNorm(
            norm.output,
            source.name,
            norm.kind == "layer",
            norm.eps or 0.0,
            norm.weight,
            norm.offset,
            norm.bias,
            tuple(readers),
            all(biases),
        )


def _between(node: fx.Node) -> str:
    return f"{node.name} is a norm's result and part of the sum: no turn goes through its gain"
