"""What each command prints and writes when all goes well."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from commands import BUDGET, Files, Run

from redpass import __version__
from redpass.manifest import verify_artifact
from redpass.passes import PASSES


def test_version_and_help(run: Run) -> None:
    assert run("--version").out == f"redpass {__version__}\n"
    for command in ("optimize", "inspect", "analyze", "export", "bench", "explain", "bisect",
                    "replay", "passes"):  # fmt: skip
        assert command in run("--help").out
        assert run(command, "--help").code == 0


def test_help_shows_specs_whole(run: Run) -> None:
    assert "int64[batch,seq]" in run("inspect", "--help").out


def test_optimize_writes_a_whole_artifact_and_names_it(run: Run, files: Files) -> None:
    found = run(
        "optimize", files.model, "--data", files.data, *BUDGET, "--out", files.out, "--no-bench"
    )
    assert found.code == 0, found.err
    assert sorted(verify_artifact(files.out).files) == [
        "model.onnx", "model.pt2", "plan.json", "report.html", "report.json",
    ]  # fmt: skip
    for part in ("budget met", "Parameters", "FLOPs", "relative_error", "layers.1.feed-forward"):
        assert part in found.out
    assert f"wrote {files.out / 'report.html'}" in found.out
    assert found.err == "", "nothing is drawn when nobody watches"
    assert sorted(path.name for path in files.out.parent.iterdir()) == [
        "model.pt2",
        "out",
        "rows.npz",
    ]


def test_optimize_json_is_one_document(run: Run, files: Files) -> None:
    found = run(
        "optimize", files.model, "--data", files.data, *BUDGET, "--out", files.out, "--no-bench",
        "--json",
    )  # fmt: skip
    data = json.loads(found.out)
    assert data["verdict"] == "met"
    assert data["after"]["parameters"] < data["before"]["parameters"]
    assert data["after"]["file_bytes"] > 0
    assert str(files.out / "plan.json") in data["written"]


def test_optimize_without_budget_runs_exact_passes_only(run: Run, files: Files) -> None:
    found = run("optimize", files.model, "--out", files.out, "--passes", "drop_noops", "--no-bench")
    assert found.code == 0, found.err
    assert "exact passes only" in found.out


def test_quiet_prints_nothing(run: Run, files: Files) -> None:
    found = run(
        "optimize",
        files.model,
        "--out",
        files.out,
        "--passes",
        "drop_noops",
        "--no-bench",
        "--quiet",
    )
    assert (found.code, found.out, found.err) == (0, "", "")


def test_dry_run_plans_and_writes_nothing(run: Run, files: Files) -> None:
    found = run("optimize", files.model, "--data", files.data, *BUDGET, "--dry-run")
    assert found.code == 0, found.err
    assert "dry run" in found.out
    assert re.search(r"planned \d x drop_branches\.similar", found.out)
    assert not files.out.exists()


def test_formats_are_chosen(run: Run, files: Files) -> None:
    words = ("--out", files.out, "--passes", "drop_noops", "--no-bench", "--format", "onnx")
    assert run("optimize", files.model, *words).code == 0
    assert not (files.out / "model.pt2").exists()
    assert (files.out / "model.onnx").exists()


def test_force_replaces_an_older_result(run: Run, files: Files) -> None:
    words = ("optimize", files.model, "--out", files.out, "--passes", "drop_noops", "--no-bench")
    assert run(*words).code == 0
    assert run(*words).code == 8
    assert run(*words, "--force").code == 0
    verify_artifact(files.out)


def test_inspect(run: Run, files: Files) -> None:
    found = run("inspect", files.model)
    assert found.code == 0, found.err
    for part in (
        "parameters",
        "8.92 K",
        "x:float32[batch,seq,8]",
        "0-3",
        "feed-forward",
        "gelu 64",
    ):
        assert part in found.out
    data = json.loads(run("inspect", files.model, "--json").out)
    assert data["parameters"] == 8920
    assert [row["kind"] for row in data["rows"]] == ["feed-forward"] * 4
    assert data["dims"]["batch"] == [1, None]


def test_analyze(run: Run, files: Files, tmp_path: Path) -> None:
    report = tmp_path / "page.html"
    found = run("analyze", files.model, "--data", files.data, "--report", report)
    assert found.code == 0, found.err
    assert "similarity" in found.out
    assert "Where the redundancy is" in report.read_text()
    data = json.loads(run("analyze", files.model, "--data", files.data, "--json").out)
    assert len(data["matrices"][0]["values"]) == 5


@pytest.fixture
def result(run: Run, files: Files) -> Path:
    words = ("--data", files.data, *BUDGET, "--out", files.out, "--no-bench")
    assert run("optimize", files.model, *words).code == 0
    return files.out


def test_explain_a_result(run: Run, result: Path) -> None:
    found = run("explain", result)
    assert "applied 2 x drop_branches.similar" in found.out
    assert "layers.0.feed-forward" in found.out, "what was left alone is told too"
    one = run("explain", result, "layers.1")
    assert "layers.1.feed-forward" in one.out
    assert "layers.2" not in one.out
    data = json.loads(run("explain", result, "layers.1", "--json").out)
    assert [action["outcome"] for action in data["actions"]] == ["applied"]


def test_explain_a_model_by_a_dry_run(run: Run, files: Files) -> None:
    found = run("explain", files.model, "layers.2", "--data", files.data, *BUDGET)
    assert found.code == 0, found.err
    assert "planned 1 x drop_branches.similar" in found.out


def test_replay_gives_the_same_program(
    run: Run, result: Path, files: Files, tmp_path: Path
) -> None:
    found = run("replay", result, files.model, "--out", tmp_path / "again")
    assert found.code == 0, found.err
    again = (tmp_path / "again" / "model.onnx").read_text()
    assert again == (result / "model.onnx").read_text()


def test_bisect_names_the_first_harmful_action(run: Run, result: Path, files: Files) -> None:
    words = ("bisect", result, files.model, "--data", files.data, "--budget")
    assert (
        "drop_branches.similar:layers.2.feed-forward" in run(*words, "relative_error<=0.0001").out
    )
    assert "holds with all actions" in run(*words, "relative_error<=0.05").out


def test_passes_lists_each(run: Run) -> None:
    found = run("passes")
    for name in PASSES:
        assert name in found.out
    data = json.loads(run("passes", "--json").out)
    assert [item["name"] for item in data] == list(PASSES)
    assert all(item["removes"].endswith(".") for item in data)
    runs = {item["name"]: item["runs"] for item in data}
    assert runs["drop_noops"] == "always"
    assert runs["prune_channels"] == runs["drop_branches"] == "with a budget"
    assert runs["drop_layers"] == "by name"
