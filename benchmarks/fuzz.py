"""Damages files at random and reads them: counts crashes, hangs and untyped exceptions.

python benchmarks/fuzz.py [--count 10000] [--seed 0] [--only pt2,config] [--case NUMBER]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "safety"))

import formats
import fuzzing

STEP = 500


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default=",".join(formats.FORMATS))
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
    for start in range(0, options.count, STEP):
        numbers = range(start, min(start + STEP, options.count))
        part = fuzzing.fuzz(form, numbers, folder, options.seed)
        found.counts += part.counts
        for number, how in part.bad:
            print(f"  case {number}: {how}", flush=True)
        found.bad += part.bad
        seconds = time.monotonic() - started
        print(f"{name}: {numbers.stop} cases, {dict(found.counts)} in {seconds:.0f} s", flush=True)
    return bool(found.bad)


if __name__ == "__main__":
    main()
