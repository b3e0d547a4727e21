"""The widths of a program by the labels that users name them by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from redpass.analysis.experts import stack_of
from redpass.analysis.structure import Branch, Structure, structure
from redpass.analysis.widths.experts import Site, site_of
from redpass.analysis.widths.narrowing import Width, Widths, widths
from redpass.facts import Facts
from redpass.program import Program

EXPERT = "it is inside one of several experts that are not stacked in one weight"
ALONE = "no residual stream is around the experts"


@dataclass(frozen=True)
class ChannelPlaces:
    """Widths with unique labels.

    Attributes:
        by_label: `layers.3.feed-forward`, `channels.7` or `stream` (coupling groups), else
            `hidden.` and the node of the last reader.
        kinds: label -> `feed-forward`, `experts` (of a stack of them), `channels` (a convolution
            has it) or `hidden`.
        obstacles: label -> why it cannot be cut; only those that cannot.
        table: all widths, for edits.
        sites: label -> what is watched of a stack of experts.
    """

    by_label: Mapping[str, Width]
    kinds: Mapping[str, str]
    obstacles: Mapping[str, str]
    table: Widths
    sites: Mapping[str, Site]


def channel_places(program: Program, facts: Facts) -> ChannelPlaces:
    """Names every width and says which can be cut."""
    table, found = facts.get(widths), facts.get(structure)
    by_label: dict[str, Width] = {}
    kinds: dict[str, str] = {}
    obstacles: dict[str, str] = {}
    sites: dict[str, Site] = {}
    for width in table.found:
        kind = _kind(program, found, width)
        label = _unique(_label(found, width, kind), by_label)
        by_label[label], kinds[label] = width, kind
        why = width.obstacle or _why_not(program, found, width)
        if kind == "experts":
            site = _site(program, found, width)
            if isinstance(site, Site):
                sites[label] = site
            else:
                why = why or site
        if why:
            obstacles[label] = why
    return ChannelPlaces(
        MappingProxyType(by_label),
        MappingProxyType(kinds),
        MappingProxyType(obstacles),
        table,
        MappingProxyType(sites),
    )


def _kind(program: Program, found: Structure, width: Width) -> str:
    if _branches(found, width):
        return "feed-forward"
    if _is_stack(program, width):
        return "experts"
    ranks = (program.weights[reader.weight].dim() for reader in width.readers)
    return "channels" if any(rank > 2 for rank in ranks) else "hidden"


def _is_stack(program: Program, width: Width) -> bool:
    """Whether the width is inside of experts that are stacked in one weight."""
    return all(stack_of(program.nodes[reader.node]) for reader in width.readers)


def _site(program: Program, found: Structure, width: Width) -> Site | str:
    branch = _around(found, width)
    return site_of(program, width, branch.after) if branch else ALONE


def _around(found: Structure, width: Width) -> Branch | None:
    """The branch of experts that a width is inside of."""
    nodes = {*width.makers, *(reader.node for reader in width.readers)}
    return next((b for b in found.branches if b.experts and nodes <= b.path), None)


def _branches(found: Structure, width: Width) -> list[str]:
    nodes = {reader.node for reader in width.readers}
    return [b.label for b in found.branches if b.feed_forward and b.feed_forward.down.node in nodes]


def _label(found: Structure, width: Width, kind: str) -> str:
    if kind == "feed-forward":
        return _branches(found, width)[0]
    if kind == "experts" and (branch := _around(found, width)):
        return branch.label
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
    return EXPERT if not _is_stack(program, width) and _around(found, width) else ""
