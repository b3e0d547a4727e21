"""The leaderboard on the smallest model of the test bed: equal cost, files, spread over seeds."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

import testbed
from benchmarks import leaderboard
from benchmarks.board import Board, Line, write
from benchmarks.leaderboard import Bench, Budget
from redpass.errors import DataError

CHEAP = ("block influence", "angular span", "random branches", "magnitude")


@pytest.fixture(scope="module")
def bench() -> Bench:
    return leaderboard.prepare("vit", rows=8, batch=4, reporting=8)


@pytest.fixture(scope="module")
def lines(bench: Bench) -> list[Line]:
    *_, last = leaderboard.run(bench, CHEAP, Budget("parameters", (0.12, 0.25)), seeds=2)
    return last


def test_recipes_save_the_same_amount(bench: Bench, lines: list[Line]) -> None:
    goals = leaderboard.targets(bench.program, Budget("parameters", (0.12, 0.25)))
    total = bench.program.weights.values()
    whole = sum(value.numel() for value in total)
    assert [line.recipe for line in lines] == [*CHEAP, *CHEAP]
    for line in lines:
        wanted = 1 - goals[line.share] / whole
        # A branch more or less: attention is a third of a layer.
        assert wanted - 0.01 <= line.costs["parameters"] <= wanted + 0.06, line.recipe
    by_layers = [line for line in lines if line.recipe in CHEAP[:2]]
    for line in by_layers:
        assert line.costs["parameters"] == pytest.approx(1 - goals[line.share] / whole, abs=0.01)


@pytest.mark.slow
def test_searches_save_the_same_amount_too(bench: Bench) -> None:
    budget = Budget("parameters", (0.12, 0.25))
    (lines,) = leaderboard.run(bench, ("greedy on layers", "block influence"), budget, seeds=1)
    searched, scored = (line.costs["parameters"] for line in lines[2:])
    assert searched == pytest.approx(scored, abs=0.01)
    # Measured on other rows than these, so near the best there is rather than above it.
    assert lines[2].values["kl"][0] < 2 * lines[3].values["kl"][0]


def test_only_chance_and_data_vary_with_the_seed(lines: list[Line]) -> None:
    spread = {line.recipe: line.values["kl"][1] for line in lines if line.share == 0.25}
    assert spread["random branches"] > 0
    assert spread["magnitude"] == 0


def test_rows_that_are_in_two_splits_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = testbed.load("vit")
    same = dict.fromkeys(model.splits, model.splits["choosing"])
    monkeypatch.setattr(leaderboard.testbed, "load", lambda _: replace(model, splits=same))
    with pytest.raises(DataError, match="the same row is in 'calibration' and 'choosing'"):
        leaderboard.prepare("vit", rows=8, batch=4, reporting=8)


def test_too_few_rows_for_a_metric_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(leaderboard.MODEL_METRICS, "vit", ("retrieval",))
    with pytest.raises(DataError, match="2 rows are too few for metric 'retrieval'"):
        leaderboard.prepare("vit", rows=4, batch=2, reporting=2)


def test_files(bench: Bench, lines: list[Line], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    original = leaderboard.original_figures(bench)
    words = leaderboard.data_words(bench, 2)
    write(Board("vit", bench.metrics, "parameters", original, words, lines), tmp_path / "new")
    stem = tmp_path / "new" / "leaderboard-vit"
    table = stem.with_suffix(".md").read_text().splitlines()
    assert table[2].startswith(
        "8 calibration rows, of which each of 2 seeds picks half to choose by"
    )
    assert table[4].startswith("| layers off | recipe | parameters left, % | flops left, %")
    assert [row.split(" | ")[1] for row in table[6:]] == ["original", *CHEAP, *CHEAP]
    record = json.loads(stem.with_suffix(".json").read_text())
    assert record["lines"][1]["recipe"] == "angular span"
    points = record["curves"][0]["points"]
    assert [point["label"] for point in points] == ["", "12%", "25%"]
    assert 0 == points[0]["removed"] < points[1]["removed"] < points[2]["removed"]
    assert record["original"]["kl"] == 0
    assert stem.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
