"""Latency after a quarter of the layers' FLOPs was removed.

    python benchmarks/depth_latency.py --models gpt2,qwen3 --rounds 15

Three of twelve layers are dropped from each model of the test bed (which ones does not matter for
time); then `redpass.bench` times original and result in turn, eager and in ONNX Runtime. The goal
is a ratio of at most 0.80 at batch 1 and 8.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import redpass
import testbed
from redpass import bench, rewrite
from redpass.analysis import cost
from redpass.analysis.blocks import blocks
from redpass.facts import Facts
from redpass.passes.drop_layers import DropLayers
from redpass.program import Program
from redpass.state import renumber_state

GOAL = 0.80
PREFILL = ({"batch": 1, "seq": 128, "past": 0}, {"batch": 8, "seq": 128, "past": 0})


def shortened(program: Program) -> Program:
    """Returns the program without every fourth layer."""
    labels = tuple(block.label for block in blocks(program))[2::4]
    plan = DropLayers(only=labels).plan(program, Facts(program))
    return renumber_state(rewrite.apply(program, plan.actions))


def layers_flops(program: Program, sizes: dict[str, int]) -> int:
    """Returns what all branches compute together."""
    return sum(part.flops(sizes) for part in cost(program).by_branch.values())


def main() -> None:
    """Times all models and prints one line for each runner and size."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", default="gpt2,qwen3")
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    for name in options.models.split(","):
        original = redpass.load(testbed.load(name).module)
        result = shortened(original)
        left = layers_flops(result, PREFILL[0]) / layers_flops(original, PREFILL[0])
        table = bench.compare(
            original,
            result,
            runners=("eager", "onnxruntime"),
            sizes=PREFILL,
            rounds=options.rounds,
            threads=1,
        )
        for row in table.rows:
            verdict = row.failure or ("met" if row.ratio <= GOAL else "missed")
            print(
                f"{name}: layers' FLOPs left {left:.2f}; {row.runner}, {row.sizes}: "
                f"{row.original_ms:.1f} -> {row.optimized_ms:.1f} ms, ratio {row.ratio:.3f} "
                f"({row.spread[0]:.3f} to {row.spread[1]:.3f}): {verdict}",
                flush=True,
            )


if __name__ == "__main__":
    main()
