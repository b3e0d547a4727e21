"""`redpass emit` on the command line: what it writes, refuses and says."""

from __future__ import annotations

import json
from pathlib import Path

import hot_models
import pytest
import torch
from building import Builder

import redpass
from redpass.cli import main
from redpass.codegen.aot import SHARED_LIMIT, build
from redpass.codegen.ops import OPS
from redpass.errors import ExportError
from redpass.export import to_pt2
from redpass.manifest import digest, verify_artifact


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "paths.pt2"
    to_pt2(hot_models.paths(), path)
    return path


def test_files_index_and_manifest_are_written(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(["emit", str(model), "--out", str(out), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    verify_artifact(out)
    index = json.loads((out / "kernels/kernels.json").read_text())
    assert index["format"] == "redpass-kernels-1"
    assert index["versions"]["redpass"] == redpass.__version__
    assert [entry["file"] for entry in index["kernels"]] == [k["file"] for k in said["kernels"]]
    for entry in index["kernels"]:
        path = out / "kernels" / entry["file"]
        assert (entry["bytes"], entry["sha256"]) == (path.stat().st_size, digest(path))
        assert (out / "kernels" / entry["test"]).exists()
        assert entry["places"]
    sizes = {entry["op"]: entry["operands"] for entry in index["kernels"]}
    assert sizes["redpass::low_rank_linear"]["down"] == "float32[5,24]"


def test_kernels_are_a_form_of_a_result_too(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ["export", str(model), "--format", "pt2,kernels", "--out", str(out), "--quiet"]
    assert main(words) == 0
    verify_artifact(out)
    assert (out / "model.pt2").exists()
    index = json.loads((out / "kernels/kernels.json").read_text())
    assert len(index["kernels"]) == 4


def test_a_folder_that_exists_is_not_overwritten(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("keep")
    assert main(["emit", str(model), "--out", str(out)]) == 8
    assert "exists already" in capsys.readouterr().err
    assert main(["emit", str(model), "--out", str(out), "--force"]) == 8
    assert "was not written by redpass" in capsys.readouterr().err
    assert [path.name for path in out.iterdir()] == ["mine.txt"]


def test_force_replaces_an_older_result(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert main(["emit", str(model), "--out", str(out), "--quiet"]) == 0
    first = (out / "kernels/kernels.json").stat().st_mtime_ns
    assert main(["emit", str(model), "--out", str(out), "--quiet", "--force"]) == 0
    assert (out / "kernels/kernels.json").stat().st_mtime_ns != first


def test_machine_code_is_built_without_a_gpu(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("triton")
    out, home = tmp_path / "out", Path.home() / ".triton"
    was_there = home.exists()
    assert main(["emit", str(model), "--out", str(out), "--aot", "sm_90", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["aot"]
    assert {row["file"] for row in rows} >= {"add_norm_1.py", "gated_feed_forward.py"}
    for row in rows:
        assert row["spills"] == 0
        assert 0 < row["registers"] <= 255
        assert row["shared"] <= SHARED_LIMIT["sm_90"]
        stem = f"{row['file'][:-3]}.{row['sample']}.{row['kernel']}.sm_90"
        assert ".target sm_90a" in (out / f"kernels/aot/{stem}.ptx").read_text()
        assert (out / f"kernels/aot/{stem}.cubin").read_bytes()[:4] == b"\x7fELF"
    verify_artifact(out)
    assert home.exists() == was_there, "nothing is written to the home directory"


def test_a_model_without_hot_paths_is_no_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    b = Builder()
    path, out = tmp_path / "relu.pt2", tmp_path / "out"
    to_pt2(b.program(b.call(torch.ops.aten.relu.default, b.input("x", "batch", 3))), path)
    assert main(["emit", str(path), "--out", str(out)]) == 0
    assert "no hot path was found" in capsys.readouterr().out
    assert json.loads((out / "kernels/kernels.json").read_text())["kernels"] == []


@pytest.mark.parametrize(
    ("extra", "code", "message"),
    [
        (["--aot", "sm_9"], 2, "unknown architecture 'sm_9'"),
        (["--tune"], 2, "there is none"),
        ([], 2, "no place for the result"),
    ],
)
def test_what_cannot_be_done_is_said(
    extra: list[str],
    code: int,
    message: str,
    model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if torch.cuda.is_available() and extra == ["--tune"]:
        pytest.skip("there is a GPU")
    out = ["--out", str(tmp_path / "out")] if extra else []
    assert main(["emit", str(model), *out, *extra]) == code
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_without_triton_nothing_is_compiled(
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("redpass.codegen.aot.has_triton", lambda: False)
    assert main(["emit", str(model), "--out", str(tmp_path / "aot"), "--aot", "sm_80"]) == 9
    assert "triton is not installed" in capsys.readouterr().err
    assert not (tmp_path / "aot").exists()


def test_interpreted_kernels_are_not_compiled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    arguments = next(iter(OPS["add_norm"].samples(torch.float16)))[1]
    with pytest.raises(ExportError, match="interpreted kernels cannot be compiled"):
        build(OPS["add_norm"], arguments, "sm_80", tmp_path)
