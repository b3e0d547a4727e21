"""The command line in this process, on a small program instead of a model file."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from commands import Files, Outcome, Run

from redpass import Splits, export
from redpass.cli import main, sources
from redpass.data import Batches
from redpass.program import Program


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a command line: `run("inspect", path)`."""

    def call(*words: object) -> Outcome:
        code = main([str(word) for word in words])
        captured = capsys.readouterr()
        return Outcome(code, captured.out, captured.err)

    return call


def write_stub(
    program: Program, folder: Path, formats: tuple[str, ...]
) -> dict[str, export.Report]:
    for name in formats:
        (folder / f"model.{name}").write_text(program.text)
    return {}


@pytest.fixture
def files(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    residual: Program,
    residual_data: Splits,
) -> Files:
    """A model and data that load without parsing, and a writer of text files."""
    found = Files(tmp_path / "model.pt2", tmp_path / "rows.npz", tmp_path / "out")
    found.model.write_text("stands for a model")
    found.data.write_text("stands for rows")
    rows = (residual_data.calibration, residual_data.choosing, residual_data.reporting)
    batches = Batches(tuple(itertools.chain(*rows)), str(found.data))
    monkeypatch.setattr(sources.source, "check", lambda *_, **__: None)
    monkeypatch.setattr(sources, "load", lambda *_, **__: residual)
    monkeypatch.setattr(sources, "read", lambda *_: batches)
    monkeypatch.setattr(export, "write", write_stub, raising=False)
    return found
