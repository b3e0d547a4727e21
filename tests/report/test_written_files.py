"""The report's files: strict JSON, read back as written, and refused when they are not."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from sample import sample

from redpass.errors import LoadError
from redpass.record import Recipe, from_json
from redpass.report import read_record, write_report


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    record = sample()
    write_report(record, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "plan.json", "report.html", "report.json",
    ]  # fmt: skip
    assert read_record(tmp_path) == record
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert from_json(Recipe, plan) == record.recipe


def test_numbers_that_are_none_are_null(tmp_path: Path) -> None:
    record = sample()
    quality = [dataclasses.replace(q, stderr=float("inf")) for q in record.quality]
    write_report(dataclasses.replace(record, quality=quality), tmp_path)

    def refuse(text: str) -> None:
        raise AssertionError(f"{text} is not JSON")

    data = json.loads((tmp_path / "report.json").read_text(), parse_constant=refuse)
    assert data["quality"][0]["stderr"] is None
    write_report(read_record(tmp_path), tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"version": 1}', "[" * 100_000])
def test_report_that_is_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "report.json").write_text(text)
    with pytest.raises(LoadError, match=r"report\.json: is not a report"):
        read_record(tmp_path)


def test_missing_report(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match=r"holds no report\.json"):
        read_record(tmp_path)
