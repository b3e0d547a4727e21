"""Latency after a quarter of the layers' FLOPs was cut out of the feed-forwards.

    python benchmarks/width_latency.py --models gpt2,qwen3 --rounds 15

All feed-forwards are cut alike, to the widest multiple of 8 that leaves at most 75% of the FLOPs of
all layers (which channels go does not matter for time); then `redpass.bench` times original and
result in turn, eager and in ONNX Runtime. The goal is a ratio of at most 0.80. Written to
results/width_latency.md.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

import redpass
import testbed
from redpass import bench, rewrite
from redpass.analysis import cost
from redpass.analysis.widths.narrowing import narrow
from redpass.analysis.widths.places import channel_places
from redpass.facts import Facts
from redpass.plan import Action
from redpass.program import Program

GOAL = 0.80
LEFT = 0.75
SIZES = ({"batch": 1, "seq": 128, "past": 0}, {"batch": 8, "seq": 128, "past": 0})
RESULTS = Path(__file__).parent / "results"


def layers_flops(program: Program) -> int:
    """Returns what all branches compute together for 128 tokens."""
    return sum(part.flops(SIZES[0]) for part in cost(program).by_branch.values())


def narrower(program: Program) -> tuple[Program, int, float]:
    """Returns the program with narrower feed-forwards, their width, and the share of FLOPs left."""
    found = Facts(program).get(channel_places)
    places = [w for label, w in found.by_label.items() if found.kinds[label] == "feed-forward"]
    whole, width = layers_flops(program), min(place.size for place in places)
    while True:
        width -= 8
        keep = torch.arange(width)
        edits = [e for place in places for e in narrow(found.table, place, keep, {}, program)]
        result = rewrite.apply(program, [Action("cut", "all", tuple(edits), "")])
        if (left := layers_flops(result) / whole) <= LEFT:
            return result, width, left


def main() -> None:
    """Times all models, prints and writes one line for each runner and size."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", default="gpt2,qwen3")
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    lines = ["# Latency of narrower feed-forwards", "", __doc__.split("\n\n")[2], ""]
    lines += ["| model | width | layers' FLOPs left | runner | sizes | ms before | after | ratio |"]
    lines += ["|---|---|---|---|---|---|---|---|"]
    for name in options.models.split(","):
        original = redpass.load(testbed.load(name).module)
        result, width, left = narrower(original)
        table = bench.compare(
            original,
            result,
            runners=("eager", "onnxruntime"),
            sizes=SIZES,
            rounds=options.rounds,
            threads=1,
        )
        for row in table.rows:
            verdict = row.failure or ("met" if row.ratio <= GOAL else "missed")
            lines.append(
                f"| {name} | {width} | {left:.1%} | {row.runner} | {row.sizes} "
                f"| {row.original_ms:.1f} | {row.optimized_ms:.1f} | {row.ratio:.3f} "
                f"({row.spread[0]:.3f} to {row.spread[1]:.3f}): {verdict} |"
            )
            print(lines[-1], flush=True)
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "width_latency.md").write_text("\n".join([*lines, ""]))


if __name__ == "__main__":
    main()
