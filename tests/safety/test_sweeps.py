"""The sweeps that take minutes, each a script with figures of its own."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SWEEPS = {
    "fuzz.py": ["--count", "1000"],
    "faults.py": [],
    "kills.py": ["--kills", "20"],
    "memory.py": ["--limits", "30"],
    "refusals.py": [],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SWEEPS)
def test_sweep(name: str) -> None:
    if name == "faults.py" and not shutil.which("cc"):
        pytest.skip("needs a C compiler")
    words = [sys.executable, BENCHMARKS / name, *SWEEPS[name]]
    done = subprocess.run(words, capture_output=True, text=True, cwd=BENCHMARKS.parent)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
