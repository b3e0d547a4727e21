"""The widths of a program by the labels that users name them by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from redpass.analysis.structure import Structure, structure
from redpass.analysis.widths.narrowing import Width, Widths, widths
from redpass.facts import Facts
from redpass.program import Program

EXPERT = "it is inside an expert, and experts are cut together or not at all"


@dataclass(frozen=True)
class ChannelPlaces:
    """Widths with unique labels.

    Attributes:
        by_label: `layers.3.feed-forward`, `channels.7` or `stream` (coupling groups), else
            `hidden.` and the node of the last reader.
        kinds: label -> `feed-forward`, `channels` (a convolution has it) or `hidden`.
        obstacles: label -> why it cannot be cut; only those that cannot.
        table: all widths, for edits.
    """

    by_label: Mapping[str, Width]
    kinds: Mapping[str, str]
    obstacles: Mapping[str, str]
    table: Widths


def channel_places(program: Program, facts: Facts) -> ChannelPlaces:
    """Names every width and says which can be cut."""
    table, found = facts.get(widths), facts.get(structure)
    by_label: dict[str, Width] = {}
    kinds: dict[str, str] = {}
    obstacles: dict[str, str] = {}
    for width in table.found:
        kind = _kind(program, found, width)
        label = _unique(_label(found, width, kind), by_label)
        by_label[label], kinds[label] = width, kind
        why = width.obstacle or _why_not(program, found, width)
        if why:
            obstacles[label] = why
    return ChannelPlaces(
        MappingProxyType(by_label), MappingProxyType(kinds), MappingProxyType(obstacles), table
    )


def _kind(program: Program, found: Structure, width: Width) -> str:
    if _branches(found, width):
        return "feed-forward"
    ranks = (program.weights[reader.weight].dim() for reader in width.readers)
    return "channels" if any(rank > 2 for rank in ranks) else "hidden"


def _branches(found: Structure, width: Width) -> list[str]:
    nodes = {reader.node for reader in width.readers}
    return [b.label for b in found.branches if b.feed_forward and b.feed_forward.down.node in nodes]


def _label(found: Structure, width: Width, kind: str) -> str:
    if kind == "feed-forward":
        return _branches(found, width)[0]
    held = {(holder.weight, holder.axis) for holder in width.holders}
    for group in found.coupling_groups:
        mine = {(member.weight, member.axis) for member in group.members}
        if group.kind in ("channels", "stream") and mine <= held:
            return group.label
    return f"hidden.{width.readers[-1].node}"


def _unique(label: str, taken: Mapping[str, Width] | Sequence[str]) -> str:
    found, number = label, 2
    while found in taken:
        found, number = f"{label}.{number}", number + 1
    return found


def _why_not(program: Program, found: Structure, width: Width) -> str:
    if program.is_fake:
        return "the weights carry no data"
    nodes = {*width.makers, *(reader.node for reader in width.readers)}
    if any(branch.experts is not None and nodes <= branch.path for branch in found.branches):
        return EXPERT
    return ""
