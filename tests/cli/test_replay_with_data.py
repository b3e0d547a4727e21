"""Replaying a plan whose weights were computed from data: the same data, or a clear refusal."""

from __future__ import annotations

from pathlib import Path

import pytest
from commands import Files, Run

from redpass import export
from redpass.cli import sources
from redpass.data import Batches
from redpass.fingerprint import fingerprint
from redpass.program import Program

CUTS = "prune_channels(multiple=1),drop_branches,refit_projections"


def write_marks(
    program: Program, folder: Path, formats: tuple[str, ...]
) -> dict[str, export.Report]:
    """Writes what tells graphs and weights apart."""
    for name in formats:
        (folder / f"model.{name}").write_text(fingerprint(program))
    return {}


def test_a_plan_with_computed_weights_replays_on_the_same_data_only(
    run: Run, files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "write", write_marks)
    words = (files.model, "--data", files.data)
    budget = ("--passes", CUTS, "--budget", "relative_error<=0.3", "--no-bench")
    done = run("optimize", *words, *budget, "--out", files.out)
    assert done.code == 0, done.err
    plan = (files.out / "plan.json").read_text()
    assert "prune_channels" in plan

    again = tmp_path / "again"
    assert run("replay", files.out, *words, "--out", again).code == 0
    assert (again / "model.onnx").read_text() == (files.out / "model.onnx").read_text()

    none = run("replay", files.out, files.model, "--out", tmp_path / "none")
    assert none.code != 0
    assert "--data" in none.err

    batches = sources.read()
    monkeypatch.setattr(sources, "read", lambda *_: Batches(batches.items[::-1]))
    other = run("replay", files.out, *words, "--out", tmp_path / "other")
    assert other.code != 0
    assert "not the calibration data" in other.err
    assert not (tmp_path / "other").exists()
