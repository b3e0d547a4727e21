"""Latency after a quarter of a model's FLOPs was removed: layers, feed-forward channels, heads.

    python benchmarks/latency.py --models gpt2,qwen3 --rounds 15

Three forms: a quarter of the layers (and of the layers' FLOPs; what is left of all FLOPs is in the
table); feed-forwards cut alike, to the widest multiple of 16 that leaves at most 75% of all FLOPs;
and a quarter of the heads, then feed-forwards as far as that takes. Which ones go does not matter
for time. `redpass.bench` times original and result in turn, eager and in ONNX Runtime, on one
thread. The goal is a ratio of at most 0.80 at batch 1 and 8. Written to results/latency.md.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.leaderboard import prepare
from redpass import bench, rewrite
from redpass.analysis import cost
from redpass.analysis.blocks import blocks
from redpass.analysis.widths.narrowing import narrow
from redpass.analysis.widths.places import channel_places
from redpass.data import Batches
from redpass.facts import Facts
from redpass.passes.drop_layers import DropLayers
from redpass.passes.prune_heads import PruneHeads
from redpass.plan import Action
from redpass.program import Program
from redpass.state import renumber_state

GOAL = 0.80
LEFT = 0.75
SIZES = ({"batch": 1, "seq": 128, "past": 0}, {"batch": 8, "seq": 128, "past": 0})
RUNNERS = ("eager", "onnxruntime")
RESULTS = Path(__file__).parent / "results"


def flops(program: Program) -> int:
    """Returns what the whole model computes for one row of 128 tokens."""
    return int(cost(program).flops(SIZES[0]))


def fewer_layers(program: Program) -> Program:
    """Returns the program without every fourth layer."""
    labels = tuple(block.label for block in blocks(program))[2::4]
    plan = DropLayers(only=labels).plan(program, Facts(program))
    return renumber_state(rewrite.apply(program, plan.actions))


def fewer_heads(program: Program, data: Batches) -> Program:
    """Returns the program with three quarters of the heads, and of keys and values with them."""
    plan = PruneHeads(shares=(LEFT,), refit=False).plan(program, Facts(program, data))
    return rewrite.apply(program, plan.actions)


def narrower(program: Program, most: float) -> tuple[Program, int]:
    """Returns the program with feed-forwards just narrow enough for `most` FLOPs, their width."""
    found = Facts(program).get(channel_places)
    places = [w for label, w in found.by_label.items() if found.kinds[label] == "feed-forward"]
    width = min(place.size for place in places)
    result = program
    while flops(result) > most:
        width -= 16
        keep = torch.arange(width)
        edits = [e for place in places for e in narrow(found.table, place, keep, {}, program)]
        result = rewrite.apply(program, [Action("cut", "all", tuple(edits), "")])
    return result, width


def forms(program: Program, data: Batches) -> Iterator[tuple[str, Program]]:
    """Yields what was cut, and the program without it."""
    yield "a quarter of the layers", fewer_layers(program)
    most = LEFT * flops(program)
    result, width = narrower(program, most)
    yield f"feed-forwards to {width} channels", result
    result, width = narrower(fewer_heads(program, data), most)
    yield f"heads to {LEFT:.0%}, feed-forwards to {width} channels", result


def timed(name: str, rounds: int) -> Iterator[str]:
    """Yields a line of the table for each form, runner and size."""
    bench_of = prepare(name, 4, 2, 2)
    whole = flops(bench_of.program)
    for what, result in forms(bench_of.program, bench_of.calibration):
        settings: Any = {"sizes": SIZES, "rounds": rounds, "threads": 1}
        table = bench.compare(bench_of.program, result, runners=RUNNERS, **settings)
        for row in table.rows:
            verdict = row.failure or ("met" if row.ratio <= GOAL else "missed")
            yield (
                f"| {name} | {what} | {flops(result) / whole:.1%} | {row.runner} | {row.sizes} "
                f"| {row.original_ms:.1f} | {row.optimized_ms:.1f} | {row.ratio:.3f} "
                f"({row.spread[0]:.3f} to {row.spread[1]:.3f}): {verdict} |"
            )


def main() -> None:
    """Times all models, prints and writes one line for each form, runner and size."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", default="gpt2,qwen3")
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    lines = ["# Latency of a quarter less", "", __doc__.split("\n\n")[2], ""]
    lines += ["| model | cut | FLOPs left | runner | sizes | ms before | after | ratio |"]
    lines += ["|---|---|---|---|---|---|---|---|"]
    for name in options.models.split(","):
        for line in timed(name, options.rounds):
            print(line, flush=True)
            lines.append(line)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "latency.md").write_text("\n".join([*lines, ""]))


if __name__ == "__main__":
    main()
