"""Candidates that a form which has to be written cannot hold: told before anything is measured."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace

from redpass.budget.candidates import Candidate
from redpass.engine import Engine
from redpass.lineage import extend
from redpass.plan import Action
from redpass.program import Program

Holds = Callable[[Program], str]
"""Says why a form cannot hold a program, or ""."""


def unwritable(engine: Engine, pool: Sequence[Candidate], holds: Holds) -> dict[Candidate, str]:
    """Returns the candidates of `pool` that a form cannot hold, each alone, and why.

    What holds for one place is taken to hold for those of the same name but for numbers, where it
    is a refusal: finding no configuration takes many tries. Passes that were told what to do
    (`only`) are not asked about: what they do may fit together only.
    """
    found: dict[Candidate, str] = {}
    known: dict[str, str] = {}
    for candidate in pool:
        if getattr(candidate.pass_, "only", ()):
            continue
        kind = re.sub(r"\d+", "*", f"{candidate.action.rule} {candidate.place}")
        why = known.get(kind) or _why(engine, candidate.action, holds)
        if why:
            found[candidate] = known[kind] = why
    return found


def _why(engine: Engine, action: Action, holds: Holds) -> str:
    lineage = extend(engine.program, engine.source, [action])
    return holds(replace(engine.program, lineage=lineage))
