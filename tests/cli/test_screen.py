"""Progress and warnings: seen by who watches a terminal, by nobody else."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from redpass.cli.options import RunOptions
from redpass.cli.screen import Screen
from redpass.progress import Silent, track

SCRIPT = """
import sys, time
from redpass.cli.options import RunOptions
from redpass.cli.screen import Screen
from redpass.progress import track
screen = Screen(RunOptions(quiet="quiet" in sys.argv, json="json" in sys.argv))
with screen.listening() as listener:
    for i in track(range(3), listener, "trying [red]x", 3):
        listener.message(f"accepted {i} \\x1b[31m")
        time.sleep(0.15)
screen.show("result")
screen.emit({"verdict": "met"})
"""


def on_a_terminal(*words: str, **environment: str) -> str:
    """Runs the script on a terminal of its own and returns all that was drawn."""
    leader, follower = pty.openpty()
    variables = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "100", **environment}
    worker = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, *words], stdout=follower, stderr=follower, env=variables
    )
    os.close(follower)
    drawn = b""
    try:
        while part := os.read(leader, 65536):
            drawn += part
    except OSError:  # Linux reports the end of a terminal as an error
        pass
    assert worker.wait() == 0
    os.close(leader)
    return drawn.decode()


def test_terminal_sees_bars_and_messages() -> None:
    drawn = on_a_terminal()
    for part in ("trying [red]x", "2/3", "left", "accepted 1 \\x1b[31m", "result"):
        assert part in drawn


def test_quiet_terminal_sees_nothing() -> None:
    assert on_a_terminal("quiet") == ""


def test_no_color_is_respected() -> None:
    assert "\x1b[3" in on_a_terminal()
    assert "\x1b[3" not in on_a_terminal(NO_COLOR="1")


def test_pipe_sees_the_result_alone() -> None:
    found = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True)
    assert (found.stdout, found.stderr) == ("result\n", "")
    found = subprocess.run([sys.executable, "-c", SCRIPT, "json"], capture_output=True, text=True)
    assert found.stdout == '{\n "verdict": "met"\n}\n'


def test_own_warnings_are_shown_and_those_of_libraries_are_not(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with Screen(RunOptions()).listening() as listener:
        assert isinstance(listener, Silent)
        warnings.warn_explicit("weight 'w' holds NaN", UserWarning, "x.py", 1, "redpass.frontend")
        warnings.warn_explicit("noise", UserWarning, "y.py", 1, "torch.onnx")
    assert capsys.readouterr().err == "warning: weight 'w' holds NaN\n"
    with Screen(RunOptions(quiet=True)).listening():
        warnings.warn_explicit("weight 'w' holds NaN", UserWarning, "x.py", 1, "redpass.frontend")
    assert capsys.readouterr().err == ""


def test_track_tells_of_every_item(tmp_path: Path) -> None:
    class Recorder(Silent):
        heard: list[str] = []

        def start(self, stage: str, total: int | None = None) -> None:
            self.heard.append(f"start {stage} {total}")

        def advance(self, stage: str, note: str = "") -> None:
            self.heard.append("advance")

        def finish(self, stage: str) -> None:
            self.heard.append("finish")

    assert list(track("ab", Recorder(), "work", 2)) == ["a", "b"]
    assert Recorder.heard == ["start work 2", "advance", "advance", "finish"]
