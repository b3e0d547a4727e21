"""What the tests of the command line share: the words they run, and what they see."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Outcome:
    """What a user sees of one command."""

    code: int
    out: str
    err: str


Run = Callable[..., Outcome]


@dataclass(frozen=True)
class Files:
    """Files that stand for the model and the data of the tests."""

    model: Path
    data: Path
    out: Path


BUDGET = (
    "--passes",
    "drop_noops,drop_branches,drop_dead_nodes",
    "--budget",
    "relative_error<=0.05",
)
