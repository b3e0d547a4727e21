"""What verified greedy search costs, against trying every candidate from the embedding up.

    python benchmarks/greedy_cost.py --model gpt2 --share 0.2 --rows 8 --rounds 3

Both choose branches of the same model on the same rows, one at a time, by measured loss. `plain`
runs the whole of every candidate at every step (SLEB and BlockPruner as published); `redpass` runs
candidates from their first changed node on, and tries again only those that may be the best. Given
are operations run, processor seconds, their ratio in each round and the medians, what each chose
and the loss of it on rows that neither saw.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.leaderboard import Bench, prepare
from redpass import rewrite
from redpass.budget import choose
from redpass.facts import Facts
from redpass.passes.drop_branches import DropBranches
from redpass.plan import Action
from redpass.program import Program
from redpass.verify.metrics import METRICS, Originals, evaluate


@dataclass(frozen=True)
class Cost:
    """One search: what it chose, operations run, processor seconds."""

    actions: tuple[Action, ...]
    operations: int
    seconds: float


def calls(program: Program) -> int:
    """Returns how many operations a run of the program does."""
    return sum(node.op == "call_function" for node in program.graph.nodes)


def plain(bench: Bench, steps: int) -> Cost:
    """Runs every candidate whole at every step; takes the least loss for what it saves."""
    started, operations = time.process_time(), 0
    program, data = bench.program, bench.calibration
    pool = list(DropBranches().plan(program, Facts(program, data)).actions)
    originals, accepted, loss = Originals(program, data), list[Action](), 0.0
    for _ in range(steps):
        scores = []
        for action in pool:
            trial = rewrite.apply(program, [*accepted, action])
            found = evaluate(METRICS["loss"], trial, program, data, originals=originals)
            operations += calls(trial) * len(data)
            rise = found.difference - loss
            saved = action.saving["parameters"]
            scores.append((rise / saved if rise > 0 else rise * saved, found.difference, action))
        _, loss, best = min(scores, key=lambda item: item[0])
        accepted.append(best)
        pool.remove(best)
    return Cost(tuple(accepted), operations, time.process_time() - started)


def quick(bench: Bench, share: float) -> Cost:
    """Redpass's own search."""
    started = time.process_time()
    found = choose(
        bench.program, "drop_branches", share=share, data=bench.calibration, metric="loss"
    )
    return Cost(found.actions, found.operations, time.process_time() - started)


def held_out(bench: Bench, actions: Sequence[Action]) -> float:
    """Returns by how much the loss rises on rows that nobody chose by."""
    trial = rewrite.apply(bench.program, actions)
    originals = bench.originals
    found = evaluate(METRICS["loss"], trial, bench.program, bench.reporting, originals=originals)
    return found.difference


def main() -> None:
    """Runs both in turn and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="gpt2")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--share", type=float, default=0.2)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    bench = prepare(options.model, options.rows, 4, reporting=16)
    times, work = [], []
    for number in range(options.rounds):
        ours = quick(bench, options.share)
        theirs = plain(bench, len(ours.actions))
        times.append(ours.seconds / theirs.seconds)
        work.append(ours.operations / theirs.operations)
        print(
            f"round {number}: plain {theirs.seconds:.1f} s, {theirs.operations} operations; "
            f"redpass {ours.seconds:.1f} s, {ours.operations}; ratio {times[-1]:.3f}",
            flush=True,
        )
    print(f"median: time {statistics.median(times):.3f}, operations {statistics.median(work):.3f}")
    for name, cost in (("plain", theirs), ("redpass", ours)):
        targets = ", ".join(action.target for action in cost.actions)
        print(f"{name}: {targets}; loss +{held_out(bench, cost.actions):.4f} held out")


if __name__ == "__main__":
    main()
