"""Records from parsed JSON: what fits comes back, what does not is an error with its kind."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from typing import Any

import pytest

from redpass.record import LatencyRecord, QualityRecord, Recipe, from_json

QUALITY = QualityRecord("kl", "choosing", "lower", 0.0, math.inf, 1 / 3, 0.1, 12, "kl<=1", None)
RECIPE = Recipe([("drop_noops", ["a", "b"]), ("x(y=1)", [])], "m.pt2", "00", "11", "", 3, "0.1")
LATENCY = LatencyRecord("eager", "batch 1", 2.0, 1, 0.5, (0.4, 0.6))


@pytest.mark.parametrize("record", [QUALITY, RECIPE, LATENCY])
def test_records_come_back(record: Any) -> None:
    assert from_json(type(record), json.loads(json.dumps(asdict(record)))) == record


def test_null_is_a_number_that_json_has_not() -> None:
    assert math.isnan(from_json(QualityRecord, asdict(QUALITY) | {"stderr": None}).stderr)


@pytest.mark.parametrize(
    "change",
    [{"passes": [["a", "b"]]}, {"passes": {}}, {"passes": [["a", [], 3]]}, {"passes": 3},
     {"seed": 1.5}, {"seed": True}, {"model": None}, {"version": ["1"]}, {"passes": [5]}],
)  # fmt: skip
def test_values_of_another_kind_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises((TypeError, ValueError)):
        from_json(Recipe, asdict(RECIPE) | change)


@pytest.mark.parametrize("data", [None, 3, "text", [], {}, {"passes": []}])
def test_what_is_no_record_is_refused(data: Any) -> None:
    with pytest.raises(TypeError):
        from_json(Recipe, data)


def test_one_of_two_kinds_is_meant() -> None:
    assert from_json(QualityRecord, asdict(QUALITY) | {"met": True}).met is True
    with pytest.raises(TypeError, match="bool or NoneType"):
        from_json(QualityRecord, asdict(QUALITY) | {"met": "yes"})
