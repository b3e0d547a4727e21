"""Coupling groups: dimensions of weights that must change together, or not at all."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from redpass.analysis.axes import Dimension, resolve
from redpass.analysis.couplings import Couplings
from redpass.analysis.flow import Flow
from redpass.analysis.members import CouplingGroup, Member
from redpass.analysis.records import (
    Attention,
    Branch,
    FeedForward,
    Projection,
    Structure,
)


def coupling_groups(flow: Flow, found: Structure) -> tuple[CouplingGroup, ...]:
    """The groups of a program: stream widths, heads, inner widths, convolution channels."""
    couplings = Couplings(flow)
    members = _members(flow, couplings)
    streams = _stream_dimensions(couplings, found, members)
    groups = [
        CouplingGroup(_numbered("stream", i), "stream", d.size, tuple(members[d]), d.fixed)
        for i, d in enumerate(streams)
    ]
    for branch in found.branches:
        groups += _of_branch(flow, branch)
    convolutions = _convolutions(flow)
    rest = [d for d in members if d not in streams and _is_channels(members[d], convolutions)]
    groups += [
        CouplingGroup(f"channels.{i}", "channels", d.size, tuple(members[d]), d.fixed)
        for i, d in enumerate(rest)
    ]
    return tuple(groups)


def _numbered(name: str, place: int) -> str:
    return name if place == 0 else f"{name}.{place + 1}"


def _members(flow: Flow, couplings: Couplings) -> dict[Dimension, list[Member]]:
    found: dict[Dimension, list[Member]] = {}
    for node in flow.program.weight_nodes:
        for axis, segments in enumerate(couplings.axes.get(node) or ()):
            offset = 0
            for segment in resolve(segments):
                member = Member(str(node.target), axis, offset, segment.block)
                found.setdefault(segment.dimension, []).append(member)
                offset += segment.length
    return found


def _stream_dimensions(
    couplings: Couplings, found: Structure, members: dict[Dimension, list[Member]]
) -> list[Dimension]:
    """The feature dimension of each stream value: the last axis that weights have too."""
    result: dict[Dimension, None] = {}
    for name in found.stream:
        for axis in reversed(couplings.of(name)):
            if len(axis) == 1 and axis[0].dimension in members:
                result[axis[0].dimension] = None
                break
    return list(result)


def _convolutions(flow: Flow) -> frozenset[str]:
    """Names of weights with spatial axes."""
    weights = flow.program.weight_nodes
    return frozenset(str(n.target) for n in weights if len(flow.shape(n) or ()) >= 4)


def _is_channels(members: Sequence[Member], convolutions: frozenset[str]) -> bool:
    return len(members) > 1 and any(m.weight in convolutions and m.axis < 2 for m in members)


def _of_branch(flow: Flow, branch: Branch) -> Iterator[CouplingGroup]:
    attention, inner = branch.attention, branch.feed_forward
    if attention is not None and attention.query and attention.output:
        units = _head_members(attention)
        size = attention.kv_heads if attention.kv_heads > 1 else attention.heads
        fixed = _why_heads_are_fixed(flow, attention)
        yield CouplingGroup(f"{branch.label}.heads", "heads", size, tuple(units), fixed)
    if inner is not None:
        members = tuple(_inner_members(inner))
        yield CouplingGroup(f"{branch.label}.inner", "inner", inner.width, members)


def _head_members(attention: Attention) -> Iterator[Member]:
    queries, outputs = attention.query, attention.output
    assert queries is not None
    assert outputs is not None
    shared = attention.kv_heads > 1
    unit_of = attention.key_of_head if shared else tuple(range(attention.heads))
    size = attention.kv_heads if shared else attention.heads
    yield from _head_rows(queries, unit_of, size, with_bias=True)
    yield from _head_rows(outputs, unit_of, size, with_bias=False)
    for projection in (attention.key, attention.value) if shared else ():
        if projection is not None:
            yield from _head_rows(projection, tuple(range(size)), size, with_bias=True)


def _head_rows(
    projection: Projection, unit_of: Sequence[int], size: int, *, with_bias: bool
) -> Iterator[Member]:
    if len(projection.rows) != len(unit_of):
        return
    rows = tuple(
        tuple(i for head, row in enumerate(projection.rows) if unit_of[head] == unit for i in row)
        for unit in range(size)
    )
    yield Member(projection.weight, projection.axis, 0, len(rows[0]), rows)
    if with_bias and projection.bias is not None:
        yield Member(projection.bias, 0, 0, len(rows[0]), rows)


def _why_heads_are_fixed(flow: Flow, attention: Attention) -> str:
    if None in (attention.key, attention.value) and attention.kv_heads > 1:
        return "its keys or values come from no single map"
    if attention.mask is None:
        return ""
    sizes = flow.shape(flow.program.nodes[attention.mask]) or ()
    if len(sizes) >= 3 and sizes[-3] == attention.heads and attention.heads > 1:
        return "its mask has a slice for each head"
    return ""


def _inner_members(inner: FeedForward) -> Iterator[Member]:
    for projection in (inner.up, inner.gate, inner.down):
        if projection is None:
            continue
        features = projection.rows[0]
        first = features[0]
        plain = isinstance(features, range) and features.step == 1
        shown: tuple[Sequence[int], ...] = () if plain else tuple((i,) for i in features)
        yield Member(projection.weight, projection.axis, first if plain else 0, 1, shown)
        if projection.bias is not None and projection is not inner.down:
            yield Member(projection.bias, 0, first if plain else 0, 1, shown)
