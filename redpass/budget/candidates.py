"""Candidates: the actions of all approximate passes of one search, and what each would bring.

Nothing here knows which family an action belongs to: a program goes in, a smaller one comes out,
and its quality and its cost are measured.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from redpass.budget.quality import Quality
from redpass.plan import Action, Pass
from redpass.record import CostRecord

COSTS = ("parameters", "bytes", "flops", "kv_bytes_per_token")

PATIENCE = 6
"""Candidates that are measured again in one step; see `Greedy`."""


@dataclass(eq=False)
class Candidate:
    """An action that may be taken.

    Attributes:
        pass_: the pass that planned it.
        loss: by how much the quality got worse, against the program it was last tried on.
        worth: share of the cost it saved there, 0 to 1.
        step: how many candidates were accepted when it was last tried, -1 when never.
        mark: fingerprint of the program with it, while `step` is the current one; "" when a run is
            not kept.
        cost: what that program costs.
    """

    pass_: Pass
    action: Action
    loss: float = math.inf
    worth: float = 1.0
    step: int = -1
    mark: str = field(default="", repr=False)
    cost: CostRecord | None = field(default=None, repr=False)
    quality: Quality = field(default_factory=dict, repr=False)

    @property
    def place(self) -> str:
        """What it is about: of candidates with one place, rivals, at most one is taken."""
        return self.action.place or self.action.key

    @property
    def score(self) -> tuple[float, float]:
        """What comes first: the least loss for what it saves; of equal ones the largest saving."""
        if self.loss > 0:
            return (self.loss / max(self.worth, 1e-12), -self.worth)
        return (self.loss * self.worth, -self.worth)


def relative_saving(before: CostRecord, after: CostRecord, names: Iterable[str] = ()) -> float:
    """Returns the mean share of the costs that was saved: of those named, else of all there are."""
    known = [name for name in (names or COSTS) if getattr(before, name)]
    shares = [1 - getattr(after, name) / getattr(before, name) for name in known]
    return sum(shares) / len(shares) if shares else 0.0


def predicted_saving(action: Action, before: CostRecord, names: Iterable[str] = ()) -> float:
    """Returns the mean share of the costs that an action says it saves, as `relative_saving`."""
    known = [name for name in (names or COSTS) if getattr(before, name)]
    shares = [action.saving.get(name, 0.0) / getattr(before, name) for name in known]
    return sum(shares) / len(shares) if shares else 0.0


Try = Callable[[Candidate], bool]
"""Tries a candidate on top of what was accepted and fills in its figures; False when it is out."""


MOST = 64
"""Candidates tried alone at the start, those with the best scores of their own; the others are
tried when all of these are settled."""


def best_guesses(pool: Sequence[Candidate]) -> list[Candidate]:
    """Returns the pool in the order of the passes' own scores, the least predicted loss first."""
    return sorted(pool, key=lambda candidate: candidate.action.loss or 0.0)


class Greedy:
    """Picks the candidate that harms least for what it saves, measuring as few as it can.

    A candidate's loss seldom gets smaller when others have been taken before it. So candidates are
    tried again in the order of their last known scores, and the first that beats the next one's old
    score is the one (lazy evaluation: Minoux 1978). As losses rise all together when a model gets
    thin, this alone would try nearly all again: after `PATIENCE` fresh trials the best of those is
    taken.

    Source: SLEB (Song et al. 2024, arXiv:2402.09025) for layers, BlockPruner (Zhong et al. 2024,
    arXiv:2406.10594) for branches; both try every candidate at each step.
    """

    def __init__(self, attempt: Try) -> None:
        self.attempt = attempt

    def next(self, pool: Sequence[Candidate], step: int) -> Candidate | None:
        """Returns the candidate to take next, tried at this `step`; None when all are out."""
        best: Candidate | None = None
        fresh = 0
        for candidate in sorted(pool, key=lambda c: c.score):
            if best is not None and (candidate.score >= best.score or fresh >= PATIENCE):
                break
            if candidate.step != step:
                fresh += 1
                if not self.attempt(candidate):
                    continue
            if best is None or candidate.score < best.score:
                best = candidate
        return best
