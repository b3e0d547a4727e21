"""Kills `redpass optimize` at random moments and resumes it: same bytes, hardly anything twice.

    python benchmarks/kills.py [--kills 20] [--rows 256] [--model vit] [--seed 0]

Cost is processor time of the killed and the resumed run together against one undisturbed run.
Runs are forked from a process that has PyTorch, so its import does not count. Loading, tracing and
the exact passes are done twice whatever the journal holds: their share shrinks as the search grows.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
VARYING = {"report.json", "report.html", "manifest.json"}
"""Files that hold times, or digests of those that do."""


@dataclass(frozen=True)
class Done:
    """One run: how it ended, its processor and wall seconds, and what its journal counted."""

    code: int
    cpu: float
    wall: float
    counts: dict[str, int]


def start(words: list[str], counts: Path, after: float | None = None) -> Done:
    """Runs `redpass` with `words` in a fork, and kills it `after` so many seconds."""
    counts.unlink(missing_ok=True)
    began = time.monotonic()
    child = os.fork()
    if not child:
        os._exit(_command(words, counts))
    if after is not None:
        time.sleep(after)
        os.kill(child, signal.SIGKILL)
    _, status, usage = os.wait4(child, 0)
    code = os.waitstatus_to_exitcode(status)
    if code > 0:
        sys.exit(f"the run failed with code {code}")
    found = json.loads(counts.read_text()) if counts.exists() else {}
    wall = time.monotonic() - began
    return Done(code, usage.ru_utime + usage.ru_stime, wall, found)


def _command(words: list[str], counts: Path) -> int:
    from redpass import journal
    from redpass.cli import main

    opened, real = [], journal.Journal.open.__func__  # type: ignore[attr-defined]
    journal.Journal.open = classmethod(  # type: ignore[method-assign,assignment]
        lambda *a, **k: opened.append(real(*a, **k)) or opened[-1]
    )
    code = main(words)
    found = {name: sum(getattr(j, name) for j in opened) for name in ("computed", "recalled")}
    counts.write_text(json.dumps(found))
    return code


def model_files(out: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(out)): path.read_bytes()
        for path in sorted(out.rglob("*"))
        if path.is_file() and path.name not in VARYING
    }


def write_data(model: str, path: Path, rows: int) -> None:
    """Writes rows nobody trained on, each once; text in pieces of 128 tokens."""
    sys.path.insert(0, str(ROOT))
    import numpy as np

    import testbed

    splits = testbed.load(model).splits
    name = next(iter(splits["choosing"].inputs))
    parts = [splits[split].inputs[name].numpy() for split in ("calibration", "choosing")]
    found = np.concatenate(parts)
    found = np.unique(found.reshape(-1, 128) if found.ndim == 2 else found, axis=0)
    if len(found) < rows:
        sys.exit(f"there are only {len(found)} rows")
    np.savez(path, **{name: found[:rows]})


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
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--model", default="vit")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        sweep(Path(name), options)


def sweep(folder: Path, options: argparse.Namespace) -> None:
    data, out, counts = folder / "rows.npz", folder / "out", folder / "counts.json"
    write_data(options.model, data, options.rows)
    words = [
        "optimize", str(ROOT / "testbed/weights" / options.model), "--data", str(data),
        "--passes", "drop_noops,drop_branches,drop_dead_nodes", "--budget", "kl<=1",
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
    sys.exit(bool(wrong or max(repeated) > 0))


if __name__ == "__main__":
    main()
