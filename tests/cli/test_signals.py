"""Ctrl-C and SIGTERM: the right code within five seconds, the target untouched, nothing left."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from redpass import artifact, manifest

SCRIPT = """
import sys, time, hashlib
from redpass.cli import main, sources

def load(*_, **__):
    print("started", flush=True)
    {block}

sources.source.check = lambda *_, **__: None
sources.load, sources.prepare = load, lambda run: None
sys.exit(main(["export", sys.argv[1], "--out", sys.argv[2], "--force"]))
"""

BLOCKS = {
    "interruptible": "time.sleep(60)",
    "native": "hashlib.pbkdf2_hmac('sha256', b'a', b'b', 2_000_000_000)",
    "swallowing": """
    while True:
        try:
            time.sleep(60)
        except BaseException:
            pass
""",
}


def stop(folder: Path, block: str, number: signal.Signals) -> tuple[int, float, str]:
    """Signals a command that is at work; returns its exit code, the seconds it took, stderr."""
    model = folder / "model.pt2"
    model.write_text("stands for a model")
    words = [
        sys.executable,
        "-c",
        SCRIPT.format(block=BLOCKS[block]),
        str(model),
        str(folder / "out"),
    ]
    worker = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert worker.stdout is not None
    assert worker.stdout.readline() == "started\n"
    started = time.monotonic()
    worker.send_signal(number)
    _, err = worker.communicate(timeout=30)
    return worker.returncode, time.monotonic() - started, err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("block", BLOCKS)
def test_stop(tmp_path: Path, block: str, number: signal.Signals) -> None:
    with artifact.staged(tmp_path / "out") as folder:
        (folder / "model.onnx").write_text("old")
    code, seconds, err = stop(tmp_path, block, number)
    assert code == 128 + number
    assert seconds < 5
    assert "nothing was written" in err
    assert "Traceback" not in err
    manifest.verify_artifact(tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.pt2", "out"]


def test_first_result_leaves_no_trace(tmp_path: Path) -> None:
    code, _, _ = stop(tmp_path, "interruptible", signal.SIGTERM)
    assert code == 143
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.pt2"]


def test_killed_run_is_cleaned_up_by_the_next(tmp_path: Path) -> None:
    code, _, _ = stop(tmp_path, "interruptible", signal.SIGKILL)
    assert code == -signal.SIGKILL
    assert len(list(tmp_path.glob(".out*"))) == 2, "its hidden folder and its lock"
    with artifact.staged(tmp_path / "out") as folder:
        (folder / "model.onnx").write_text("new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.pt2", "out"]


def test_handlers_are_put_back() -> None:
    from redpass.cli import main

    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    assert main(["--version"]) == 0
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
