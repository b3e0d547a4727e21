"""Puts a thin affine map of the stream in place of dropped layers.

x1 = next layer(x)      ->      x1 = next layer(x + linear(linear(x, a), b))
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from redpass.analysis import structure
from redpass.analysis.stream_maps import StreamMap, stream_maps
from redpass.errors import UsageError
from redpass.facts import Facts
from redpass.plan import Action, Exactness, Plan, Skip
from redpass.program import Program

RULE = "map_stream.ridge"
NOTHING = "no branch was dropped before one that stays, or no map is better on data held back"


@dataclass(frozen=True)
class MapStream:
    """Repairs what dropping layers did to the stream, by a map of low rank where they were.

    What: in front of the next branch that stays the stream gets an affine map added, fitted by
    ridge regression towards what the loaded model's stream was there, in two thin linears.
    When: after `drop_layers`, `drop_span` or `drop_branches` in the list of passes. Kept only when
    the quality on the choosing data is better with it and the cost goals are still reached: it
    costs two matrices of `width * rank` a gap.
    Not tried: a map of full rank, which costs as much as a projection.
    Costs: two runs over the calibration data and one linear system a gap. A recipe with it can be
    replayed only with the same data.
    Source: see `redpass.analysis.stream_maps`.

    Attributes:
        rank: of each map; 0 for the least, up to an eighth of the width, that brings nearly all.
    """

    name: ClassVar[str] = "map_stream"
    needs: ClassVar[tuple[Any, ...]] = (structure,)
    exactness: ClassVar[Exactness] = Exactness.APPROXIMATE
    repairs: ClassVar[bool] = True

    rank: int = 0

    def plan(self, program: Program, facts: Facts) -> Plan:
        """Plans one action with the maps of all gaps that gain from one."""
        if self.rank < 0:
            raise UsageError(
                f"a rank of {self.rank}", place=self.name, hint="1 or more, 0 to choose"
            )
        found = stream_maps(program, facts, self.rank)
        return Plan((_action(found),)) if found else Plan(skips=(Skip(RULE, "graph", NOTHING),))


def _action(found: tuple[StreamMap, ...]) -> Action:
    before, after = (
        sum(off) / len(found) for off in zip(*((m.before, m.after) for m in found), strict=True)
    )
    ranks = ", ".join(f"{each.rank} before {each.label}" for each in found)
    return Action(
        RULE,
        "stream",
        tuple(edit for each in found for edit in each.edits),
        f"maps of rank {ranks}: {100 * before:.3g}% of the stream was off there, "
        f"{100 * after:.3g}% is now, on batches that were not fitted on",
        {"off_before": before, "off_after": after, "maps": len(found)},
        {},
        None,
    )
