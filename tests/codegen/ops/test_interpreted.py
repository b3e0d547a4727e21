"""Runs `interpreted/` in a process of its own: there, kernels are made for the interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

FOLDER = Path(__file__).parent / "interpreted"
FILES = sorted(str(path) for path in FOLDER.glob("test_*.py"))
ATTENTION = [path for path in FILES if "clustered" in path]
"""About as long as all others together."""


@pytest.mark.parametrize("files", [ATTENTION, [path for path in FILES if path not in ATTENTION]])
def test_kernels_in_the_interpreter(files: list[str]) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files]
    done = subprocess.run(
        command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
