"""Figures, rows and groups: what the page and the terminal both show."""

from __future__ import annotations

import dataclasses
import math

import pytest
from sample import sample

from redpass.record import LatencyRecord, Matrix
from redpass.report import figures, rows
from redpass.report.heatmap import LEVELS, colors, heat_map, levels


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (7, "7"), (612, "612"), (999, "999"), (1000, "1.00 K"), (9_999, "10.0 K"),
     (22_713_216, "22.7 M"), (999_499, "999 K"), (999_500, "1.00 M"), (6.7e9, "6.70 G"),
     (1e18, "1000 P"), (-2000, "-2.00 K"), (None, "—"), (math.nan, "—"), (math.inf, "—")],
)  # fmt: skip
def test_count(value: float | None, text: str) -> None:
    assert figures.count(value) == text


@pytest.mark.parametrize(("value", "text"), [(0, "0 B"), (999, "999 B"), (90_852_864, "90.9 MB")])
def test_size(value: float, text: str) -> None:
    assert figures.size(value) == text


@pytest.mark.parametrize(
    ("before", "after", "text"),
    [(100, 80, "-20.0%"), (100, 100, "0%"), (100_000, 99_999, "-0.001%"), (0, 5, "—"),
     (-2, -1, "+50.0%"), (None, 1, "—"), (1, math.nan, "—")],
)  # fmt: skip
def test_change(before: float | None, after: float, text: str) -> None:
    assert figures.change(before, after) == text


@pytest.mark.parametrize(
    ("value", "text"), [(0.0004, "0 ms"), (0.38, "380 ms"), (12.34, "12.3 s"), (250, "4 min 10 s")]
)
def test_seconds(value: float, text: str) -> None:
    assert figures.seconds(value) == text


def test_rows_leave_out_what_the_model_has_not() -> None:
    record = sample()
    names = [row.name for row in rows.before_after(record)]
    assert "KV cache per token" not in names
    cached = dataclasses.replace(record.before, kv_bytes_per_token=4096)
    named = rows.before_after(dataclasses.replace(record, before=cached))
    assert next(row.before for row in named if row.name == "KV cache per token") == "4.10 KB"


def test_speed_within_noise_is_not_called_better() -> None:
    item = LatencyRecord("eager", "batch 1", 10.0, 9.9, 0.99, (0.97, 1.02))
    row = rows.before_after(dataclasses.replace(sample(), latency=[item]))[-2]
    assert (row.name, row.tone) == ("Latency, eager", "plain")


def test_the_headline_tells_each_runner_once() -> None:
    found = [
        LatencyRecord("eager", "batch 1", 10.0, 5.0, 0.5, (0.4, 0.6)),
        LatencyRecord("eager", "batch 8", 10.0, 4.0, 0.4, (0.3, 0.5)),
        LatencyRecord("eager", "batch 9", 10.0, 9.9, 0.99, (0.97, 1.02)),
        LatencyRecord("onnxruntime", "batch 1", 10.0, 8.0, 0.8, (0.7, 0.9)),
    ]
    text = rows.summary(dataclasses.replace(sample(), latency=found))
    assert text.endswith("2.00 to 2.50x as fast in eager, 1.25x as fast in onnxruntime.")


def test_quality_is_reported_on_data_that_chose_nothing() -> None:
    (row,) = rows.quality(sample())
    assert row.note == "256 on reporting data"
    assert row.after == "0.9843 ± 0.0011"


def test_skips_that_differ_in_a_figure_are_one_group() -> None:
    groups = rows.skip_groups(sample())
    assert [len(group.skips) for group in groups] == [6, 2]
    assert groups[0].title == "similarity … is below …"
    assert groups[1].title == "its size is read by another node"


def test_actions_that_cost_quality_come_first() -> None:
    groups = rows.action_groups(sample())
    assert [group.pass_name for group in groups][-1] == "drop_noops"
    assert {group.outcome for group in groups} == {"applied", "refused", "rolled back"}
    applied = next(g for g in groups if g.pass_name == "drop_branches" and g.outcome == "applied")
    assert applied.saving.startswith("1.77 M parameters, 7.10 MB, 459 M FLOPs")


def test_colours_rise_in_lightness() -> None:
    lights = [sum(bytes.fromhex(color[1:])) for color in colors()]
    assert lights == sorted(lights)
    assert len(set(lights)) == LEVELS


def test_levels_of_a_map() -> None:
    data = Matrix("m", ["a", "b"], [[0.0, 1.0], [math.nan, 2.0]], 0.0, 1.0)
    assert levels(data) == [[0, LEVELS - 1], [-1, LEVELS - 1]]
    flat = Matrix("m", ["a"], [[0.5]], 0.5, 0.5)
    assert levels(flat) == [[LEVELS - 1]]


def test_map_of_runs_covers_every_cell_once() -> None:
    count = 50
    values = [[((3 * i + 7 * j) % 11) / 11 for j in range(count)] for i in range(count)]
    drawn = heat_map(Matrix("m", [str(i) for i in range(count)], values))
    assert len(drawn.strips) <= LEVELS
    area = 0
    for strip in drawn.strips:
        area += sum(int(part.split("h")[1].split("v")[0]) for part in strip.path.split("M")[1:])
    assert area == count * count
