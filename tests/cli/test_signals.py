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
    return stop_script(SCRIPT.format(block=BLOCKS[block]), model, folder / "out", number)


def stop_script(
    script: str, model: Path, out: Path, number: signal.Signals, wait: float = 0.0
) -> tuple[int, float, str]:
    """Runs a script on a model and signals it, `wait` seconds after it said that it started."""
    words = [sys.executable, "-c", script, str(model), str(out)]
    worker = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert worker.stdout is not None
    assert worker.stdout.readline() == "started\n"
    time.sleep(wait)
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


REAL = """
import sys
import torch
from redpass.cli import main
{patch}
words = ["--input", "input:float32[batch,4]"] if sys.argv[1].endswith(".pt") else []
sys.exit(main(["export", sys.argv[1], "--out", sys.argv[2], "--force", *words]))
"""

TRACING = """
real = torch.export.export
def export(*args, **more):
    print("started", flush=True)
    while True:
        real(*args, **more)
torch.export.export = export
"""

WRITING_ONNX = """
from redpass.export import onnx
real = onnx.translate
def translate(*args, **more):
    print("started", flush=True)
    while True:
        real(*args, **more)
onnx.translate = translate
"""

READING = """
from redpass import trial
trial._CODE = '''import sys; sys.path[:] = {{path!r}}
import os, torch.export
from redpass import trial
trial.SECONDS = 1000
def load(_):
    open({note!r}, "w").write(str(os.getpid()))
    while True:
        pass
torch.export.load = load
trial.serve()'''
real = trial._Helper.ask
def ask(self, *args):
    import threading, time, os
    def tell():
        while not os.path.exists({note!r}):
            time.sleep(0.05)
        print("started", flush=True)
    threading.Thread(target=tell, daemon=True).start()
    return real(self, *args)
trial._Helper.ask = ask
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import torch

    folder = tmp_path_factory.mktemp("models")
    module = torch.nn.Sequential(*(torch.nn.Linear(4, 4) for _ in range(40))).eval()
    torch.save(module, folder / "model.pt")
    torch.export.save(torch.export.export(module, (torch.zeros(2, 4),)), folder / "model.pt2")
    return folder


@pytest.mark.parametrize(
    ("kind", "patch", "number"),
    [
        ("pt", TRACING, signal.SIGINT),
        ("pt", WRITING_ONNX, signal.SIGTERM),
        ("pt2", READING, signal.SIGTERM),
    ],
    ids=["tracing", "writing ONNX", "reading a .pt2 in the child"],
)
def test_stop_at_real_work(
    tmp_path: Path, models: Path, kind: str, patch: str, number: signal.Signals
) -> None:
    note = tmp_path / "note"
    text = patch.format(note=str(note)) if patch is READING else patch
    model, out = models / f"model.{kind}", tmp_path / "out"
    code, seconds, err = stop_script(REAL.replace("{patch}", text), model, out, number, wait=0.3)
    assert code == 128 + number, err
    assert seconds < 5
    assert "nothing was written" in err
    assert [path.name for path in tmp_path.iterdir() if path != note] == []
    if note.exists() and sys.platform == "linux":
        assert is_gone(int(note.read_text())), "the child that read the file went on"


def is_gone(process: int, patience: float = 10.0) -> bool:
    """Whether a process that was to be killed ends."""
    for _ in range(int(patience / 0.05)):
        try:
            status = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return True
        if status in "ZX":
            return True
        time.sleep(0.05)
    return False


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
