"""Processor seconds of what a user waits for before any work is done.

    python benchmarks/startup.py [--runs 7]

Each line is the median of fresh interpreters, taken in turns, with an empty one's taken off.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys

CASES = {
    "import redpass": "import redpass",
    "redpass --version": "from redpass.cli import main; main(['--version'])",
    "redpass --help": "from redpass.cli import main; main(['--help'])",
    "redpass optimize --help": "from redpass.cli import main; main(['optimize', '--help'])",
    "a missing model": "from redpass.cli import main; main(['inspect', '/nothing/there'])",
    "an unknown pass": (
        "from redpass.cli import main; "
        "main(['optimize', '.', '--passes', 'drop_branchs', '--out', '/nothing/there'])"
    ),
}


def seconds(code: str) -> float:
    """User and system time of one interpreter that runs `code`."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--runs", type=int, default=7)
    runs = parser.parse_args().runs
    found = [{name: seconds(code) for name, code in ({"": "pass"} | CASES).items()}
             for _ in range(runs)]  # fmt: skip
    for name in CASES:
        print(f"{name:26s} {statistics.median(one[name] - one[''] for one in found):.2f} s")


if __name__ == "__main__":
    main()
