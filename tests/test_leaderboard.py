"""The leaderboard on the smallest model of the test bed: equal cost, files, spread over seeds."""

import json
from pathlib import Path

import pytest

from benchmarks import leaderboard
from benchmarks.leaderboard import Bench, Line
from benchmarks.recipes import RECIPES


@pytest.fixture(scope="module")
def bench() -> Bench:
    return leaderboard.prepare("vit", rows=8, batch=4)


@pytest.fixture(scope="module")
def lines(bench: Bench) -> list[Line]:
    return list(leaderboard.run(bench, tuple(RECIPES), [("parameters", 0.2)], seeds=2))


def test_recipes_save_the_same_share(bench: Bench, lines: list[Line]) -> None:
    smallest = 1 / 12
    assert [line.recipe for line in lines] == list(RECIPES)
    for line in lines:
        assert 0.8 <= line.costs["parameters"] < 0.8 + smallest


def test_only_chance_varies_with_the_seed(lines: list[Line]) -> None:
    spread = {line.recipe: line.values["kl"][1] for line in lines}
    assert spread["random"] > 0
    assert spread["magnitude"] == 0


def test_files(bench: Bench, lines: list[Line], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    leaderboard.write(bench, lines, "parameters", tmp_path / "new")
    stem = tmp_path / "new" / "leaderboard-vit"
    table = stem.with_suffix(".md").read_text().splitlines()
    assert table[0].startswith("| recipe | parameters % | flops % | accuracy (higher is better)")
    assert [row.split(" | ")[0] for row in table[2:]] == [
        "| original", "| similar", "| random", "| magnitude",
    ]  # fmt: skip
    record = json.loads(stem.with_suffix(".json").read_text())
    assert record["lines"][1]["recipe"] == "random"
    assert record["original"]["kl"] == 0
    assert stem.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
