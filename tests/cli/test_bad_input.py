"""Wrong input: the exit code by kind, a message with file, place and next step, nothing written."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from commands import BUDGET, Files, Outcome, Run

from redpass.errors import PassError, RedpassError


def check(found: Outcome, code: int, kind: str, *parts: str) -> None:
    """The one form: `error[kind]: where: what`, and on the next line what to do."""
    assert found.code == code, found.err
    assert found.out == ""
    lines = found.err.splitlines()
    assert lines[0].startswith(f"error[{kind}]: "), found.err
    assert len(lines) >= 2, "what to do next is missing"
    assert lines[1].startswith("  ")
    for part in parts:
        assert part in found.err
    assert "Traceback" not in found.err


@pytest.mark.parametrize("command", ["optimize", "inspect", "analyze", "export", "explain"])
def test_missing_model(run: Run, tmp_path: Path, command: str) -> None:
    found = run(command, tmp_path / "nothing")
    check(found, 3, "load", str(tmp_path / "nothing"), "no such file or folder")


def test_empty_model(run: Run, tmp_path: Path) -> None:
    (tmp_path / "model.pt").touch()
    found = run("optimize", tmp_path / "model.pt", "--out", tmp_path / "out")
    check(found, 3, "load", "model.pt: is empty")
    assert not (tmp_path / "out").exists()


class Canary:
    """What a malicious pickle does when it is run: it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return (os.mkdir, (str(self.path),))


@pytest.mark.parametrize("form", ["zip", "plain"])
def test_malicious_pickle_does_not_run(run: Run, tmp_path: Path, form: str) -> None:
    canary, model = tmp_path / "canary", tmp_path / "model.pt"
    if form == "zip":
        torch.save(Canary(canary), model)
    else:
        model.write_bytes(pickle.dumps(Canary(canary)))
    found = run("optimize", model, "--input", "x:float32[batch,4]", "--out", tmp_path / "out")
    check(found, 3, "load", str(model))
    assert not canary.exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.pt"]


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (
            ["--passes", "drop_branchs"],
            ["--passes", "'drop_branchs'", "did you mean 'drop_branches'"],
        ),
        (["--passes", "drop_noops("], ["--passes", "not a list of passes"]),
        (["--passes", "drop_branches(kind='x')"], ["unknown option 'kind'", "'kinds'"]),
        (["--budget", "cosin>=0.9"], ["--budget", "unknown metric 'cosin'", "'cosine'"]),
        (["--budget", "cosine=0.9"], ["--budget", "is not a bound", "cosine>=0.98"]),
        (["--budget", "cosine<=0.9"], ["--budget", "cosine is bounded with >="]),
        (["--format", "onxx"], ["--format", "unknown format 'onxx'", "did you mean 'onnx'"]),
        (["--format", ","], ["--format", "names no format"]),
    ],
)
def test_wrong_option_value(run: Run, files: Files, words: list[str], parts: list[str]) -> None:
    found = run("optimize", files.model, *words, "--out", files.out)
    assert found.code == 2
    for part in ["error[usage]: ", *parts]:
        assert part in found.err
    assert not files.out.exists()


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["optimise"], "optimize"),
        (["optimize"], "MODEL"),
        (["optimize", "model", "--bugdet", "x"], "--budget"),
        (["optimize", "model", "--threads", "0"], "--threads"),
        (["optimize", "model", "--seed", "many"], "--seed"),
    ],
)
def test_wrong_command_line(run: Run, words: list[str], part: str) -> None:
    check(run(*words), 2, "usage", part, "--help")


def test_no_place_for_the_result(run: Run, files: Files) -> None:
    check(run("optimize", files.model), 2, "usage", "--out")


def test_target_exists(run: Run, files: Files) -> None:
    files.out.mkdir()
    (files.out / "mine.txt").write_text("mine")
    check(
        run("optimize", files.model, "--out", files.out), 8, "output", "exists already", "--force"
    )
    forced = run("optimize", files.model, "--out", files.out, "--force")
    check(forced, 8, "output", "was not written by redpass")
    assert (files.out / "mine.txt").read_text() == "mine"


def test_target_is_or_holds_the_input(run: Run, files: Files) -> None:
    for out in (files.model, files.model.parent):
        found = run("optimize", files.model, "--out", out, "--force")
        check(found, 8, "output", "the input")
    assert files.model.read_text() == "stands for a model"


@pytest.fixture
def closed(tmp_path: Path) -> Iterator[Path]:
    """A folder nobody can write to: without write permission, or for root on a read-only disk."""
    folder = tmp_path / "closed"
    folder.mkdir()
    if os.geteuid():
        folder.chmod(0o500)
        yield folder
        folder.chmod(0o700)
        return
    for options in (["-t", "tmpfs", "tmpfs"], ["-o", "remount,ro"]):
        if subprocess.run(["mount", *options, str(folder)], capture_output=True).returncode:
            pytest.skip("root can write everywhere, and nothing can be mounted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_target_cannot_be_written(run: Run, files: Files, closed: Path) -> None:
    for out in (closed / "out", closed / "a" / "out"):
        found = run("optimize", files.model, "--out", out)
        check(found, 8, "output", f"{closed}: the folder is not writable", "choose another --out")
    assert not list(closed.iterdir())


def test_target_below_a_file_or_a_dead_link(run: Run, files: Files, tmp_path: Path) -> None:
    (tmp_path / "dead").symlink_to(tmp_path / "nowhere")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    before = sorted(tmp_path.iterdir())
    for out, reason in (
        (files.data / "out", "is a file, not a folder"),
        (files.data / "a" / "out", "is a file, not a folder"),
        (tmp_path / "dead" / "out", "is a link to a place that is not there"),
        (tmp_path / "dead", "is a link to a place that is not there"),
        (tmp_path / "loop" / "out", "links form a loop"),
    ):
        check(run("optimize", files.model, "--out", out), 8, "output", reason)
        check(run("optimize", files.model, "--out", out, "--force"), 8, "output", reason)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("command", ["optimize", "analyze"])
def test_data_missing_or_empty(run: Run, files: Files, command: str) -> None:
    missing = files.data.with_name("none.npz")
    out = ("--out", files.out) if command == "optimize" else ()
    check(run(command, files.model, "--data", missing, *out), 5, "data", "none.npz: no such file")
    files.data.write_text("")
    check(run(command, files.model, "--data", files.data, *out), 5, "data", "rows.npz: is empty")
    assert not files.out.exists()


def test_data_is_needed(run: Run, files: Files) -> None:
    check(run("analyze", files.model), 5, "data", "--data")
    found = run("optimize", files.model, *BUDGET, "--out", files.out)
    check(found, 5, "data", "drop_branches", "--data FILE")
    assert not files.out.exists()


def test_budget_that_cannot_be_met(run: Run, files: Files) -> None:
    words = ("--data", files.data, "--passes", "drop_branches", "--out", files.out)
    found = run("optimize", files.model, *words, "--budget", "relative_error<=0.05,flops<=-90%")
    assert found.code == 7
    assert "budget missed" in found.out, "how far it came"
    assert "error[budget]: drop_branches.similar:layers.2.feed-forward: the cost goal" in found.err
    assert sorted(path.name for path in files.out.parent.iterdir()) == ["model.pt2", "rows.npz"]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"passes": 3}'])
def test_plan_that_is_none(run: Run, files: Files, text: str) -> None:
    plan = files.data.with_name("plan.json")
    plan.write_text(text)
    found = run("replay", plan, files.model, "--out", files.out)
    check(found, 3, "load", "plan.json")
    assert not files.out.exists()


def test_unknown_place(run: Run, files: Files) -> None:
    words = ("--data", files.data, *BUDGET)
    found = run("explain", files.model, "layers.1.feed-foward", *words)
    check(found, 2, "usage", "did you mean 'layers.1.feed-forward'")


def test_environment_variable_that_is_none(
    run: Run, files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REDPASS_LIMITS", "3")
    found = run("optimize", files.model, "--out", files.out)
    check(found, 2, "usage", "REDPASS_LIMITS", "did you mean 'limit'")


def fail_with(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    from redpass.cli import sources

    def load(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(sources, "load", load)


def test_fault_inside_keeps_its_traceback(
    run: Run, files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_with(monkeypatch, ZeroDivisionError("boom \x1b[31m"))
    found = run("inspect", files.model)
    check(found, 70, "internal", "ZeroDivisionError: boom \\x1b[31m", "the traceback is in ")
    kept = Path(found.err.split("the traceback is in ")[1].strip())
    assert "in load" in kept.read_text()
    kept.unlink()
    assert "Traceback (most recent call last)" in run("inspect", files.model, "--debug").err


@pytest.mark.parametrize(
    ("error", "code"),
    [(MemoryError(), 10), (PassError("boom", place="a pass", hint="reproducer: /x"), 70),
     (KeyboardInterrupt(), 130)],
)  # fmt: skip
def test_every_end_has_its_code(
    run: Run, files: Files, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int
) -> None:
    fail_with(monkeypatch, error)
    found = run("optimize", files.model, "--out", files.out)
    assert found.code == code
    assert found.err
    assert sorted(path.name for path in files.out.parent.iterdir()) == ["model.pt2", "rows.npz"]


def test_markup_in_an_error_stays_text(
    run: Run, files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_with(monkeypatch, RedpassError("[red]x[/red] \x1b]0;title\x07", hint="[bold]y"))
    found = run("inspect", files.model)
    assert found.err == "error[error]: [red]x[/red] \\x1b]0;title\\x07\n  [bold]y\n"


def test_reader_that_goes_away() -> None:
    code = "import sys; from redpass.cli import main; sys.exit(main(['--help']))"
    worker = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert worker.stdout is not None
    worker.stdout.close()
    _, err = worker.communicate()
    assert b"Traceback" not in err
    assert b"Exception ignored" not in err
