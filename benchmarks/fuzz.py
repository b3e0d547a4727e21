"""Damages files at random and reads them: counts crashes, hangs and untyped exceptions.

    python benchmarks/fuzz.py [--count 10000] [--seed 0] [--only pt2,config] [--case NUMBER]
                              [--start 0] [--results FILE]

With --results each part of 500 cases adds a line of JSON to FILE, and parts that it holds already
are not run again: a long run can be stopped and gone on with.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "safety"))

import formats
import fuzzing

STEP = 500


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default=",".join(formats.FORMATS))
    parser.add_argument("--start", type=int, default=0, help="number of the first case")
    parser.add_argument("--results", type=Path, help="file that keeps what was run")
    parser.add_argument("--case", type=int, help="run one case here and show its traceback")
    options = parser.parse_args()
    failed = False
    for name in options.only.split(","):
        with tempfile.TemporaryDirectory() as place, fuzzing.quiet():
            failed |= one(name, options, Path(place))
    sys.exit(failed)


def one(name: str, options: argparse.Namespace, folder: Path) -> bool:
    """Runs one format and prints its line. Returns whether anything bad happened."""
    (folder / "good").mkdir()
    form = formats.FORMATS[name](folder / "good")
    if options.case is not None:
        form.read(fuzzing.make(form, options.seed, options.case, folder))
        return False
    started, found = time.monotonic(), fuzzing.Outcome()
    for first in range(options.start, options.start + options.count, STEP):
        numbers = range(first, min(first + STEP, options.start + options.count))
        part = known(name, options, numbers) or fuzzing.fuzz(form, numbers, folder, options.seed)
        keep(name, options, numbers, part)
        found.counts += part.counts
        for number, how in part.bad:
            print(f"  case {number}: {how}", flush=True)
        found.bad += part.bad
        seconds = time.monotonic() - started
        print(f"{name}: {numbers.stop} cases, {dict(found.counts)} in {seconds:.0f} s", flush=True)
    return bool(found.bad)


def known(name: str, options: argparse.Namespace, numbers: range) -> fuzzing.Outcome | None:
    """Returns what the file of results says of a part, if anything."""
    for line in read(options.results):
        if line["part"] == label(name, options, numbers):
            return fuzzing.Outcome(Counter(line["counts"]), [(n, how) for n, how in line["bad"]])
    return None


def keep(name: str, options: argparse.Namespace, numbers: range, found: fuzzing.Outcome) -> None:
    """Adds a part to the file of results, once."""
    part = label(name, options, numbers)
    if options.results is None or any(line["part"] == part for line in read(options.results)):
        return
    line = {"part": part, "counts": dict(found.counts), "bad": found.bad}
    with options.results.open("a") as file:
        file.write(json.dumps(line) + "\n")


def read(path: Path | None) -> list[dict[str, Any]]:
    return [json.loads(x) for x in path.read_text().splitlines()] if path and path.exists() else []


def label(name: str, options: argparse.Namespace, numbers: range) -> str:
    return f"{name}, seed {options.seed}, cases {numbers.start} to {numbers.stop}"


if __name__ == "__main__":
    main()
