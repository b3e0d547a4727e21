"""Studies: what some choices do to models of the test bed, a record each, kept between runs.

A seed picks half of the calibration rows. Records of a model and seed are made together and take
the place of older ones, so models and seeds can be run one by one.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.leaderboard import Bench, prepare
from redpass.data import Batches

RESULTS = Path(__file__).parent / "results"
Record = dict[str, object]
Measure = Callable[[Bench, int, Batches], Iterator[Record]]
"""Model, seed and half of its calibration rows -> records, their `method` and `share` named."""
Page = Callable[[Sequence[Mapping[str, object]]], Iterator[str]]


def run(doc: str, stem: str, models: str, measure: Measure, page: Page) -> None:
    """Measures what the command line asks for; writes results/`stem`.{md,json} after each seed.

    Args:
        doc: of the script.
        models: the usual ones.
        page: records -> lines of the Markdown page.
    """
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", default=models)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--rows", type=int, default=32, help="calibration rows")
    parser.add_argument("--reporting", type=int, default=16, help="reporting rows")
    options = parser.parse_args()
    kept = RESULTS / f"{stem}.json"
    found: list[Record] = json.loads(kept.read_text()) if kept.exists() else []
    for name in options.models.split(","):
        bench = prepare(name, options.rows, 4, options.reporting)
        for seed in map(int, options.seeds.split(",")):
            found = [r for r in found if (r["model"], r["seed"]) != (name, seed)]
            started = time.perf_counter()
            for record in measure(bench, seed, half(bench.calibration, seed)):
                found.append({"model": name, "seed": seed} | record)
                value = record[bench.metrics[0]]
                words = f"{name} seed {seed} {record['share']:.0%} {record['method']}"
                print(f"{words}: {value:.4f}", flush=True)
            print(f"{name} seed {seed}: {time.perf_counter() - started:.0f} s", flush=True)
            RESULTS.mkdir(exist_ok=True)
            kept.write_text(json.dumps(found, indent=1))
            kept.with_suffix(".md").write_text("\n".join(page(found)) + "\n")
    print("\n".join(page(found)))


def half(rows: Batches, seed: int) -> Batches:
    """Returns half of the batches, two at least."""
    size = max(2, len(rows) // 2)
    picked = sorted(random.Random(seed).sample(range(len(rows)), size))
    return Batches(tuple(rows[number] for number in picked))
