"""What a compile costs: trace and exact passes of a Llama of 7B shape on fake tensors.

    python benchmarks/compile_cost.py [--layers 16,32]

Each size runs in a fresh process. Prints seconds, peak memory, and the ratio of CPU time from one
size to the next. Limits: 45 s and 2 GiB for 32 layers, 2.1 for twice the layers. The work is of
one thread, so on a machine with more work than cores its CPU time is judged instead of the wall's.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import resource
import subprocess
import sys
import time
from typing import Any

SECONDS, GIBIBYTES, GROWTH = 45, 2.0, 2.1


def run(layers: int) -> dict[str, Any]:
    """Compiles one model in this process. Returns seconds by stage, memory, and graph size."""
    import logging

    import torch
    import transformers

    import redpass
    from redpass import pipeline

    logging.getLogger("transformers").setLevel(logging.ERROR)
    config = transformers.LlamaConfig(
        vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=layers,
        num_attention_heads=32, num_key_value_heads=32,
    )  # fmt: skip
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config).eval()
    start, busy = time.perf_counter(), time.process_time()
    program = redpass.load(model, fake=True)
    traced, traced_busy = time.perf_counter(), time.process_time()
    result = pipeline.optimize(program)
    done, done_busy = time.perf_counter(), time.process_time()
    return {
        "layers": layers,
        "trace": traced - start,
        "passes": done - traced,
        "seconds": done - start,
        "cpu": done_busy - busy,
        "cpu_trace": traced_busy - busy,
        "gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "nodes": [len(program.graph.nodes), len(result.program.graph.nodes)],
        "by_pass": {
            record.spec: round(record.seconds, 2)
            for record in sorted(result.record.passes, key=lambda r: -r.seconds)[:5]
        },
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", default="16,32")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(run(arguments.one)))
        return 0
    rows = [_fresh(int(layers)) for layers in arguments.layers.split(",")]
    print("| layers | trace s | passes s | total s | CPU s | peak GiB | nodes before, after |")
    print("|--:|--:|--:|--:|--:|--:|--:|")
    for row in rows:
        print(
            f"| {row['layers']} | {row['trace']:.1f} | {row['passes']:.1f} | {row['seconds']:.1f} "
            f"| {row['cpu']:.1f} | {row['gib']:.2f} | {row['nodes'][0]}, {row['nodes'][1]} |"
        )
    load = f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "?"
    print(f"\nslowest passes of the last: {rows[-1]['by_pass']}; load {load}")
    return _judge(rows)


def _fresh(layers: int) -> dict[str, Any]:
    command = [sys.executable, __file__, "--one", str(layers)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _judge(rows: list[dict[str, Any]]) -> int:
    last, missed = rows[-1], 0
    busy = hasattr(os, "getloadavg") and os.getloadavg()[0] > (os.cpu_count() or 1)
    for name, found, limit in (
        ("CPU seconds" if busy else "seconds", last["cpu" if busy else "seconds"], SECONDS),
        ("peak GiB", last["gib"], GIBIBYTES),
    ):
        missed += found > limit
        print(f"{name}: {found:.2f}, limit {limit}{', MISSED' if found > limit else ''}")
    for before, after in itertools.pairwise(rows):
        growth = after["cpu"] / before["cpu"]
        limit = GROWTH * after["layers"] / (2 * before["layers"])
        missed += growth > limit
        print(
            f"{before['layers']} to {after['layers']} layers: CPU time x {growth:.2f}, limit "
            f"{limit:.2f}{', MISSED' if growth > limit else ''}"
        )
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())
