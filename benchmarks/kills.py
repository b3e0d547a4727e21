"""Kills `redpass optimize` at random moments and resumes it: same bytes, hardly anything twice.

    python benchmarks/kills.py [--kills 20] [--rows 512] [--model gpt2] [--seed 0]

Cost is processor time of the killed and the resumed run together against one undisturbed run.
Loading, tracing and the exact passes are done twice, whatever the journal holds; their share is
shown beside the total, because it shrinks as the search grows.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
VARYING = {"report.json", "report.html", "manifest.json"}
"""Files that hold times, or digests of those that do."""

RUN = """
import json, os, sys
from redpass import journal
from redpass.cli import main

opened, real = [], journal.Journal.open.__func__
journal.Journal.open = classmethod(lambda *a, **k: opened.append(real(*a, **k)) or opened[-1])
code = main(sys.argv[2:])
counts = [{"computed": j.computed, "recalled": j.recalled} for j in opened]
with open(sys.argv[1], "w") as file:
    json.dump(counts, file)
sys.exit(code)
"""


@dataclass(frozen=True)
class Done:
    """One run: how it ended, its processor and wall seconds, and what its journal counted."""

    code: int
    cpu: float
    wall: float
    counts: dict[str, int]


def start(words: list[str], counts: Path, after: float | None = None) -> Done:
    """Runs `redpass` with `words`, and kills it `after` so many seconds."""
    counts.unlink(missing_ok=True)
    began = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-c", RUN, str(counts), *words],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        cwd=ROOT,
    )
    if after is not None:
        time.sleep(after)
        process.send_signal(signal.SIGKILL)
    message = process.stderr.read().decode() if process.stderr else ""
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode > 0:
        sys.exit(f"the run failed: {message}")
    found = json.loads(counts.read_text())[0] if counts.exists() else {}
    wall = time.monotonic() - began
    return Done(process.returncode, usage.ru_utime + usage.ru_stime, wall, found)


def model_files(out: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(out)): path.read_bytes()
        for path in sorted(out.rglob("*"))
        if path.is_file() and path.name not in VARYING
    }


def write_data(path: Path, rows: int) -> None:
    """Writes rows of 128 tokens nobody trained on, each once."""
    sys.path.insert(0, str(ROOT))
    import numpy as np

    import testbed

    splits = testbed.load("gpt2").splits
    parts = [splits[name].inputs["input_ids"].numpy() for name in ("calibration", "choosing")]
    found = np.unique(np.concatenate(parts).reshape(-1, 128), axis=0)
    if len(found) < rows:
        sys.exit(f"there are only {len(found)} rows")
    np.savez(path, input_ids=found[:rows])


def records(folder: Path) -> int:
    """Whole records in the journal a killed run left, without its head."""
    lines = [
        line for file in folder.glob(".out.journal-*") for line in file.read_bytes().split(b"\n")
    ]
    return max(0, len(lines) - 2)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--model", default="gpt2")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        sweep(Path(name), options)


def sweep(folder: Path, options: argparse.Namespace) -> None:
    data, out, counts = folder / "rows.npz", folder / "out", folder / "counts.json"
    write_data(data, options.rows)
    words = [
        "optimize", str(ROOT / "testbed/weights" / options.model), "--data", str(data),
        "--passes", "drop_noops,drop_branches,drop_dead_nodes", "--budget", "kl<=0.2",
        "--out", str(out), "--force", "--no-bench", "--quiet",
    ]  # fmt: skip
    whole = start(words, counts)
    expected = model_files(out)
    print(f"undisturbed: {whole.cpu:.0f} s of processor time, {whole.wall:.0f} s, {whole.counts}")
    chance, ratios, wrong, repeated = random.Random(options.seed), [], 0, []
    for number in range(options.kills):
        killed = start(words, counts, chance.uniform(0.02, 0.98) * whole.wall)
        kept = records(folder)
        again = start([*words, "--resume"], counts)
        same = model_files(out) == expected and not list(folder.glob(".out*"))
        total = kept + again.counts["computed"]
        repeated.append(total - whole.counts["computed"])
        ratios.append((killed.cpu + again.cpu) / whole.cpu)
        wrong += not same
        print(
            f"{number:3d}: killed with {kept} records, {again.counts}, same bytes: {same}, "
            f"cost {100 * (ratios[-1] - 1):+.1f}%",
            flush=True,
        )
    print(
        f"{options.kills - wrong} of {options.kills} with the same bytes and nothing left behind; "
        f"records computed twice: {max(repeated)} at most, and what was under way when it died; "
        f"cost: median {100 * (statistics.median(ratios) - 1):+.1f}%, "
        f"worst {100 * (max(ratios) - 1):+.1f}%"
    )


if __name__ == "__main__":
    main()
