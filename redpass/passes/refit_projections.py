"""Fits the projections behind dropped branches anew, so that the stream is as it was.

x1 = x + linear(h, w)        x1 = x + linear(h, w_refit)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from redpass.analysis import structure
from redpass.analysis.linears import linears
from redpass.analysis.refits import Refits, refits
from redpass.facts import Facts
from redpass.plan import Action, Exactness, Plan, Skip
from redpass.program import Program

RULE = "refit_projections.ridge"


@dataclass(frozen=True)
class RefitProjections:
    """Repairs what drops and cuts before it did to the residual stream, at no cost.

    What: the output projection of attention and the down projection of feed-forwards get new
    weights and biases, all in one action, from ridge regression towards the loaded model's stream.
    When: behind passes that drop or cut, in the list of passes. Kept only when the quality on the
    choosing data is better with it.
    Not tried: weights that several layers share, parallel branches, projections with a norm behind
    them inside the branch; they stay, and the reason is told.
    Costs: two runs over the calibration data, and one linear system a projection. A recipe with it
    can be replayed only with the same data.
    Source: see `redpass.analysis.refits`.
    """

    name: ClassVar[str] = "refit_projections"
    needs: ClassVar[tuple[Any, ...]] = (structure, linears, refits)
    exactness: ClassVar[Exactness] = Exactness.APPROXIMATE
    repairs: ClassVar[bool] = True

    def plan(self, program: Program, facts: Facts) -> Plan:
        """Plans one action with all projections that gain from it."""
        del program
        fitted = facts.get(refits)
        if fitted.reason:
            return Plan(skips=(Skip(RULE, "graph", fitted.reason),))
        skips = tuple(Skip(RULE, label, why) for label, why in (fitted.skips or {}).items())
        return Plan((_action(fitted),) if fitted.found else (), skips)


def _action(fitted: Refits) -> Action:
    off = [refit.before for refit in fitted.found], [refit.after for refit in fitted.found]
    before, after = (sum(values) / len(values) for values in off)
    return Action(
        RULE,
        "stream",
        tuple(edit for refit in fitted.found for edit in refit.edits),
        f"{len(fitted.found)} projections fitted anew: {100 * before:.3g}% of the stream was off, "
        f"{100 * after:.3g}% is now, on batches that were not fitted on",
        {"off_before": before, "off_after": after, "projections": len(fitted.found)},
        {},
        None,
    )
