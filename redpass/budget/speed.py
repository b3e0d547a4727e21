"""Cuts of width that make no model faster are given back: fewer FLOPs alone are worth nothing.

A thin matrix product, or a width that no kernel likes, can cost more time than the wide one it
stands for. So what one pass cut is taken out again and both programs are measured in turn.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import cast

from redpass.budget.accounting import cost_record
from redpass.budget.candidates import Candidate
from redpass.budget.spec import Budget
from redpass.budget.trials import Trials
from redpass.engine import Engine
from redpass.fingerprint import fingerprint
from redpass.plan import Pass
from redpass.program import Program
from redpass.record import CostRecord

ROUNDS = 9
SIZES = ("parameters", "bytes")
"""Costs that are worth a goal of their own, whatever the time."""


def give_back(
    engine: Engine, trials: Trials, budget: Budget, before: CostRecord
) -> Iterator[tuple[Candidate, str]]:
    """Takes out of what was accepted what brings no speed; yields each candidate and why.

    Each pass that cut widths (`Action.place`) is judged as a whole. Its cuts go when the model is
    no faster with them in three of four rounds at each of the usual sizes in eager PyTorch: on a
    busy machine medians alone stray to both sides. They stay when they make a cache smaller, when a
    goal names the model's size, or when the goals are not reached without them.
    """
    if trials.current.is_fake or any(goal.cost in SIZES for goal in budget.goals):
        return
    for pass_ in dict.fromkeys(c.pass_ for c in trials.accepted if c.action.place):
        mine = [c for c in trials.accepted if c.pass_ is pass_ and c.action.place]
        rest = [c for c in trials.accepted if c not in mine]
        without, _ = trials.together(rest)
        if without is None or _is_needed(trials.current, without, budget, before):
            continue
        ratios = _ratios(engine, pass_, without, trials.current)
        if ratios and min(low for _, low in ratios) >= 1:
            trials.take(rest, without)
            shown = ", ".join(f"{ratio:.3f}" for ratio, _ in ratios)
            why = f"the whole model is no faster with the cuts of {pass_.name}: {shown} of the time"
            yield from ((candidate, why) for candidate in mine)


def _is_needed(current: Program, without: Program, budget: Budget, before: CostRecord) -> bool:
    now, then = (cost_record(program, before.sizes) for program in (current, without))
    is_smaller = now.kv_bytes_per_token < then.kv_bytes_per_token
    return is_smaller or (budget.reached(before, now) and not budget.reached(before, then))


def _ratios(
    engine: Engine, pass_: Pass, without: Program, current: Program
) -> Sequence[tuple[float, float]]:
    """Time with over time without at each of the usual sizes; empty when it cannot run.

    Of the rounds' ratios the median and the lower quartile.
    """
    from redpass import bench  # ONNX Runtime and its export, which most runs never need

    def measure() -> list[tuple[float, float]]:
        table = bench.compare(without, current, runners=("eager",), rounds=ROUNDS)
        return [(row.ratio, row.spread[0]) for row in table.rows if not row.failure]

    def pair() -> str:
        return f"{fingerprint(current)} over {fingerprint(without)}"

    found = engine.journal.recall(f"time of {pass_.name}, with quartiles", measure, pair)
    return cast("list[tuple[float, float]]", found)
