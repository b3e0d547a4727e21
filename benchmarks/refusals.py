"""What refusing a crafted file costs on the command line, and that nothing in it runs.

python benchmarks/refusals.py
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "safety"))

import crafted

SECONDS, BYTES = 2.0, 256 << 20
COMMAND = [sys.executable, "-m", "redpass", "inspect"]


MEASURE = """
import resource, subprocess, sys
done = subprocess.run(sys.argv[1:], stderr=subprocess.PIPE, text=True)
used = resource.getrusage(resource.RUSAGE_CHILDREN)
print(done.returncode, used.ru_utime + used.ru_stime, used.ru_maxrss)
print(done.stderr)
"""
"""A small process in between: a child starts with the peak of the one that forked it."""


def refuse(path: Path) -> tuple[int, str, float, int]:
    """Runs the command; returns its exit code, stderr, processor seconds and peak bytes."""
    words = [sys.executable, "-S", "-c", MEASURE, *COMMAND, str(path)]
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True)
    first, _, said = done.stdout.partition("\n")
    code, seconds, peak = first.split()
    return int(code), said, float(seconds), int(peak) * 1024


def main() -> None:
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        (folder / "good").mkdir()
        good = crafted.good(folder / "good", folder / "canary")
        bad = sweep(crafted.CASES, good, folder)
        ran = good.canary.exists()
    print(f"code ran: {ran}")
    sys.exit(bool(bad or ran))


def sweep(cases: dict[str, Any], good: crafted.Good, folder: Path) -> int:
    """Has each case refused and prints what that cost. Returns how many went wrong."""
    bad, slowest, largest = 0, (0.0, ""), (0, "")
    for case, (make, _) in cases.items():
        home = Path(tempfile.mkdtemp(dir=folder))
        path = make(good, home)
        before = sorted(folder.rglob("*"))
        code, said, seconds, peak = refuse(path)
        slowest, largest = max(slowest, (seconds, case)), max(largest, (peak, case))
        fine = code == 3 and str(path) in said and "\n  " in said and seconds <= SECONDS
        fine = fine and peak <= BYTES and before == sorted(folder.rglob("*"))
        if not fine:
            bad += 1
            print(f"  {case}: {code}, {seconds:.2f} s, {peak >> 20} MiB, {said[:200]}")
    print(
        f"{len(cases)} crafted files refused: {bad} over the limits or not as they should; "
        f"slowest {slowest[0]:.2f} s of processor time ({slowest[1]}), "
        f"largest {largest[0] >> 20} MiB ({largest[1]})",
        flush=True,
    )
    return bad


if __name__ == "__main__":
    main()
