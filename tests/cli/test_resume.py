"""A run that was stopped goes on with --resume: the same result, hardly anything measured twice."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from commands import BUDGET, Files, Run

from redpass.budget import quality
from redpass.cli.signals import Stopped

TIMES = ("seconds", "latency", "passes", "command")
"""What two reports of one result may differ in."""


class Meter:
    """Counts measurements, and stops the run in place of number `last`."""

    def __init__(self) -> None:
        self.done: list[str] = []
        self.last: int | None = None

    def __call__(self, budget, program, originals, split, outputs):
        if len(self.done) == self.last:
            raise Stopped(signal.SIGTERM)
        found = REAL(budget, program, originals, split, outputs)
        self.done.append(f"{split} {len(originals.batches)} {program.digest}")
        return found


REAL = quality._measure


@pytest.fixture
def meter(monkeypatch: pytest.MonkeyPatch) -> Iterator[Meter]:
    found = Meter()
    monkeypatch.setattr(quality, "_measure", found)
    return found


@pytest.fixture
def optimize(run: Run, files: Files):
    def call(*more: object):
        words = (files.model, "--data", files.data, *BUDGET, "--out", files.out, "--no-bench")
        return run("optimize", *words, *more)

    return call


def result(out: Path) -> dict[str, bytes]:
    """Every file of a result but for the times in it."""
    found = {str(p.relative_to(out)): p.read_bytes() for p in out.rglob("*") if p.is_file()}
    report = json.loads(found.pop("report.json"))
    found["report"] = json.dumps({k: v for k, v in report.items() if k not in TIMES}).encode()
    return {k: v for k, v in found.items() if k not in ("report.html", "manifest.json")}


def hidden(files: Files) -> list[str]:
    return sorted(p.name for p in files.out.parent.glob(".out*"))


def test_stopped_at_any_measurement_and_resumed(optimize, files: Files, meter: Meter) -> None:
    assert optimize().code == 0
    expected, whole = result(files.out), meter.done
    assert len(whole) > 4
    assert hidden(files) == []
    for last in (0, 1, len(whole) // 2, len(whole) - 1):
        meter.done, meter.last = [], last
        stopped = optimize("--force")
        assert stopped.code == 143
        assert "nothing was written" in stopped.err
        assert "--resume" in stopped.err, "the metric's own checks are kept before any measurement"
        assert result(files.out) == expected, "the older result is untouched"
        (journal, *more) = hidden(files)
        assert more == [f"{journal}-blocks"] * bool(more)
        assert len(more) == 1 or not last, "the original's outputs are kept"
        meter.last = None
        resumed = optimize("--force", "--resume")
        assert resumed.code == 0
        assert meter.done == whole, "nothing measured twice, nothing left out"
        assert "nothing to resume" not in resumed.err
        assert result(files.out) == expected
        assert hidden(files) == []


def test_without_resume_it_starts_afresh_and_says_so(optimize, files: Files, meter: Meter) -> None:
    meter.last = 3
    assert optimize().code == 143
    meter.done, meter.last = [], None
    again = optimize()
    assert "measurements of an interrupted run are dropped, as --resume was not given" in again.err
    assert len(meter.done) > 3
    assert hidden(files) == []


def test_other_options_do_not_take_over_the_figures(optimize, files: Files, meter: Meter) -> None:
    meter.last = 3
    assert optimize().code == 143
    meter.done, meter.last = [], None
    other = optimize("--resume", "--seed", 5)
    assert other.code == 0
    assert "nothing to resume" in other.err
    assert len(meter.done) > 3
    assert hidden(files) == []


def test_a_missed_budget_leaves_no_journal(run: Run, files: Files, meter: Meter) -> None:
    found = run(
        "optimize", files.model, "--data", files.data, "--passes", "drop_branches",
        "--budget", "relative_error<=0.05,flops<=-99%", "--out", files.out,
    )  # fmt: skip
    assert found.code == 7
    assert meter.done
    assert hidden(files) == []


def _run_in_a_fork(call, *words: object) -> int:
    child = os.fork()
    if not child:
        try:
            os._exit(call(*words).code)
        finally:
            os._exit(99)
    return child


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_at_random_moments_and_resumed(optimize, files: Files, kills: int) -> None:
    started = time.monotonic()
    assert optimize().code == 0
    expected, seconds = result(files.out), time.monotonic() - started
    chance = random.Random(3)
    for _ in range(kills):
        child = _run_in_a_fork(optimize, "--force")
        time.sleep(chance.uniform(0, seconds))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        assert result(files.out) == expected, "the old one or the new one, whole"
        assert optimize("--force", "--resume").code == 0
        assert result(files.out) == expected
        assert hidden(files) == []
