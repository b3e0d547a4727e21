"""Coupling groups and their members, as frozen records."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Member:
    """One axis of one weight (or a range of it) in a coupling group.

    Attributes:
        weight: its name.
        axis: the axis that is cut.
        offset: first index of the range.
        block: how many neighbouring indices belong to one unit of the group.
        rows: indices of each unit where they are not `offset + unit * block + ...`; else empty.
    """

    weight: str
    axis: int
    offset: int = 0
    block: int = 1
    rows: tuple[Sequence[int], ...] = ()


@dataclass(frozen=True)
class CouplingGroup:
    """Dimensions that must change together: cut unit `i` in one member means in all.

    Attributes:
        label: `stream`, `layers.3.attention.heads`, `layers.3.feed-forward.inner`, `channels.7`.
        kind: `stream`, `heads` (a unit is a key head with all its query heads; a query head where
            all share one key head), `inner` or `channels`.
        size: number of units.
        members: the weight axes.
        fixed: why it cannot be cut, or "".
    """

    label: str
    kind: str
    size: int
    members: tuple[Member, ...]
    fixed: str = ""
