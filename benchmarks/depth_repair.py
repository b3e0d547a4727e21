"""What a repair leaves of the loss that removed layers cost, by how many rows it is fitted on.

    python benchmarks/depth_repair.py --model gpt2 --fit 16,128

A fifth of the layers' parameters goes, chosen by several recipes of the leaderboard on `--rows`
calibration rows a seed; `refit_projections` then fits what stays on as many rows as `--fit` says:
statistics take one run over the data, a search takes many. Given is the rise of the loss, nats a
token, on reporting rows, and the share of it that is left. Written to `results/depth_repair.json`
after each result, which are not made again, and the table anew.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.leaderboard import Bench, Budget, judged, prepare, targets, task_of
from redpass import rewrite
from redpass.data import Batches
from redpass.facts import Facts
from redpass.passes.refit_projections import RefitProjections
from redpass.program import Program

RECIPES = ("greedy on branches", "greedy on layers", "block influence")
SHARE = 0.2
OUT = Path(__file__).parent / "results" / "depth_repair.json"


def rise(bench: Bench, program: Program, whole: float) -> float:
    """Returns by how much the loss is higher than the model's own, nats a token."""
    return math.log(judged(bench, program)["perplexity"].value) - math.log(whole)


def measure(bench: Bench, recipe: str, seed: int, rows: int, fits: list[int]) -> dict[str, float]:
    """Returns the rise without a repair, and with one fitted on each number of rows."""
    size = len(next(iter(bench.calibration[0].values())))
    choosing = Bench(
        bench.name, bench.program, bench.calibration[: rows * 2 // size], *_rest(bench)
    )
    goals = tuple(targets(bench.program, Budget("parameters", (SHARE,))).values())
    task = task_of(choosing, Budget("parameters", (SHARE,)), goals, seed)
    program = task.made(recipe)[0]
    whole = judged(bench, bench.program)["perplexity"].value
    found = {"unrepaired": rise(bench, program, whole)}
    for count in fits:
        data = task.data if count == rows else Batches(bench.calibration[: count // size].items)
        plan = RefitProjections().plan(program, Facts(program, data))
        found[str(count)] = rise(bench, rewrite.apply(program, plan.actions), whole)
    return found


def _rest(bench: Bench) -> tuple[Any, ...]:
    return bench.originals, bench.metrics


def table(kept: dict[str, Any]) -> str:
    """Returns all results as Markdown."""
    lines = ["# Repair of removed layers and branches", "", *(__doc__ or "").split("\n")[4:]]
    fits = sorted(
        {int(f) for runs in kept.values() for run in runs.values() for f in run if f[0] != "u"}
    )
    head = " | ".join(f"{count} rows, rise | left" for count in fits)
    lines += [
        f"| model, recipe | seeds | unrepaired, rise | {head} |",
        "|---" * (3 + 2 * len(fits)) + "|",
    ]
    for name, runs in kept.items():
        cells = [
            name,
            str(len(runs)),
            f"{statistics.fmean(r['unrepaired'] for r in runs.values()):.4f}",
        ]
        for count in map(str, fits):
            done = [run for run in runs.values() if count in run]
            if done:
                old, new = (statistics.fmean(run[w] for run in done) for w in ("unrepaired", count))
                cells += [f"{new:.4f}", f"{new / old:.2f}"]
            else:
                cells += ["", ""]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def main() -> None:
    """Runs the recipes that are asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--recipes", default=",".join(RECIPES))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--rows", type=int, default=16, help="rows a seed chooses by")
    parser.add_argument("--fit", default="16,128", help="rows that repairs are fitted on")
    parser.add_argument("--reporting", type=int, default=48)
    options = parser.parse_args()
    torch.set_num_threads(1)
    fits = [int(count) for count in options.fit.split(",")]
    bench = prepare(options.model, max(*fits, 2 * options.rows), 8, options.reporting)
    for seed in map(int, options.seeds.split(",")):
        for recipe in options.recipes.split(","):
            kept = json.loads(OUT.read_text()) if OUT.exists() else {}
            runs = kept.setdefault(f"{options.model}, {recipe}", {})
            if str(seed) in runs:
                continue
            started = time.perf_counter()
            runs[str(seed)] = found = measure(bench, recipe, seed, options.rows, fits)
            print(
                f"{recipe}, seed {seed}: {found}, {time.perf_counter() - started:.0f} s", flush=True
            )
            OUT.write_text(json.dumps(kept, indent=1))
            OUT.with_suffix(".md").write_text(table(kept))


if __name__ == "__main__":
    main()
