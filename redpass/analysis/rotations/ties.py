"""Weights that several nodes read: turned once where all agree, else left whole.

A matrix that is read elsewhere keeps its values for those readers; the turn is then a product of
its own beside it. A table of words that is the matrix of the output, too, is a `Tie`.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from typing import Any

from torch import fx

from redpass import ops
from redpass.analysis.linears import identity
from redpass.analysis.rotations.records import WRITES, Crossing, Stream, Tie, Turn
from redpass.program import Program


def settle(program: Program, stream: Stream) -> Stream:
    """Returns the stream with ties named, and products in place of turns that cannot be."""
    groups: dict[Any, list[Turn]] = defaultdict(list)
    for turn in stream.turns:
        groups[identity(program.weights[turn.weight]), turn.axis].append(turn)
    readers = _readers(program)
    kept, ties = list(stream.turns), []
    crossings = list(stream.crossings)
    for (key, _), turns in groups.items():
        whole = {turn.node for turn in turns} == readers[key]
        if whole and len({_form(turn) for turn in turns}) == 1:
            continue
        kept = [turn for turn in kept if turn not in turns]
        if _is_vector(program, turns):
            kept += [replace(turn, is_copied=True) for turn in turns]
            continue
        tie = _tie(program, turns) if whole else None
        if tie is not None:
            ties.append(tie)
            continue
        for turn in turns:
            crossings.append(_crossing(program, turn, stream))
            kept = [t for t in kept if t.node != turn.node or t.by != WRITES]  # its bias
    crossings = list(_merged(crossings))
    values = _without(stream.values, crossings)
    return replace(
        stream, values=values, turns=tuple(kept), ties=tuple(ties), crossings=tuple(crossings)
    )


def _without(values: tuple[str, ...], crossings: list[Crossing]) -> tuple[str, ...]:
    """The values but for those that come in whole."""
    whole = {crossing.node for crossing in crossings if crossing.by == WRITES}
    return tuple(name for name in values if name not in whole)


def split(program: Program, stream: Stream) -> Stream:
    """Returns the stream with products in place of all ties: their tables stay whole."""
    crossings = list(stream.crossings)
    for tie in stream.ties:
        crossings += [_crossing(program, turn, stream) for turn in turns_of(tie)]
    crossings = list(_merged(crossings))
    values = _without(stream.values, crossings)
    return replace(stream, values=values, ties=(), crossings=tuple(crossings))


def turns_of(tie: Tie) -> list[Turn]:
    """The turns that a tie stands for."""
    first = [Turn(tie.weight, node, tie.axis, WRITES) for node in tie.lookups]
    return first + [Turn(tie.weight, node, tie.axis, tie.norm) for node, _ in tie.heads]


def _readers(program: Program) -> dict[Any, set[str]]:
    found: dict[Any, set[str]] = defaultdict(set)
    for node in program.weight_nodes:
        key = identity(program.weights[str(node.target)])
        found[key] |= {user.name for user in node.users}
    return found


def _form(turn: Turn) -> tuple[int, str, str]:
    return turn.axis, turn.by, turn.gain


def _is_vector(program: Program, turns: list[Turn]) -> bool:
    """Whether these are biases or single constants, which each reader may have for itself."""
    weight = program.weights[turns[0].weight]
    return weight.dim() < 2 or weight.numel() == weight.shape[turns[0].axis]


def _tie(program: Program, turns: list[Turn]) -> Tie | None:
    lookups = [t for t in turns if ops.is_call(program.nodes[t.node], "embedding")]
    heads = [t for t in turns if t not in lookups]
    norms = {t.by for t in heads}
    plain = all(t.by == WRITES and not t.gain for t in lookups)
    if not (lookups and plain and len(norms) == 1 and norms <= set(program.nodes)):
        return None
    read = tuple((t.node, _input(program.nodes[t.node]).name) for t in heads)
    axes = {t.axis for t in turns}
    if len(axes) > 1:
        return None
    return Tie(turns[0].weight, axes.pop(), tuple(t.node for t in lookups), read, norms.pop())


def _input(node: fx.Node) -> fx.Node:
    """What a linear reads."""
    found = node.args[1] if ops.is_call(node, "addmm") else node.args[0]
    assert isinstance(found, fx.Node)
    return found


def _crossing(program: Program, turn: Turn, stream: Stream) -> Crossing:
    node = program.nodes[turn.node]
    if turn.by == WRITES:
        inside = {*stream.values, *(other.node for other in stream.turns)}
        users = tuple(user.name for user in node.users if user.name in inside)
        return Crossing(turn.node, users, WRITES)
    return Crossing(_input(node).name, (turn.node,), turn.by)


def _merged(crossings: list[Crossing]) -> tuple[Crossing, ...]:
    """One product a value: crossings of one value are joined, and none leaves what never came."""
    whole = {c.node for c in crossings if c.by == WRITES}
    found: dict[tuple[str, str], Crossing] = {}
    for crossing in crossings:
        if crossing.by != WRITES and crossing.node in whole:
            continue
        key = crossing.node, crossing.by
        users = (*found[key].users, *crossing.users) if key in found else crossing.users
        found[key] = Crossing(crossing.node, tuple(dict.fromkeys(users)), crossing.by)
    return tuple(found.values())
