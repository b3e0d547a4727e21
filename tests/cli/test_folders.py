"""Hugging Face folders from the command line: written where they can hold the result."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from commands import Run

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A vision transformer whose second layer adds nothing; no need of it to be trained."""
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48,
        image_size=16, patch_size=8, num_channels=1,
    )  # fmt: skip
    model = transformers.ViTForImageClassification(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):  # zeros would all be one weight
            torch.nn.init.normal_(parameter, std=1e-2)
        if ".1." in name and ("o_proj" in name or "output.dense" in name or "fc2" in name):
            torch.nn.init.normal_(parameter, std=1e-4)
    place = tmp_path_factory.mktemp("vit")
    model.save_pretrained(place)
    return place


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import numpy as np

    path = tmp_path_factory.mktemp("rows") / "rows.npz"
    values = np.random.default_rng(0).standard_normal((32, 1, 16, 16), dtype=np.float32)
    np.savez(path, pixel_values=values)
    return path


def optimize(run: Run, folder: Path, rows: Path, out: Path, passes: str) -> dict[str, object]:
    done = run(
        "optimize", folder, "--data", rows, "--batch-size", 4, "--budget", "relative_error<=0.05",
        "--passes", passes, "--out", out, "--no-bench", "--json",
    )  # fmt: skip
    assert done.code == 0, done.err
    found: dict[str, object] = json.loads(done.out)
    return found


def test_fewer_layers_are_written_as_a_folder(
    run: Run, folder: Path, rows: Path, tmp_path: Path
) -> None:
    found = optimize(run, folder, rows, tmp_path / "out", "drop_layers,merge_linears")
    model = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "out" / "hf")
    assert model.config.num_hidden_layers == 2
    assert any("parameters fewer than the source" in str(n) for n in found["notes"])  # type: ignore[attr-defined]


def test_why_a_folder_was_left_out_stands_in_the_report(
    run: Run, folder: Path, rows: Path, tmp_path: Path
) -> None:
    passes = "drop_branches(only=('layers.1.attention',))"
    found = optimize(run, folder, rows, tmp_path / "out", passes)
    assert not (tmp_path / "out" / "hf").exists()
    (note,) = (n for n in found["notes"] if "hf/" in n)  # type: ignore[attr-defined]
    assert "left out: " in note
    assert "lost only a part" in note


def test_export_writes_a_folder_and_refuses_where_there_is_none(
    run: Run, folder: Path, tmp_path: Path
) -> None:
    assert run("export", folder, "--format", "hf", "--out", tmp_path / "one").code == 0
    assert (tmp_path / "one" / "hf" / "model.safetensors").exists()
    run("export", folder, "--format", "pt2", "--out", tmp_path / "model.pt2")
    again = run("export", tmp_path / "model.pt2", "--format", "hf", "--out", tmp_path / "two")
    assert again.code == 9
    assert "came from a pt2, not from a Hugging Face folder" in again.err
    assert not (tmp_path / "two").exists()


def test_a_folder_that_is_asked_for_can_hold_what_is_done_by_default(
    run: Run, folder: Path, rows: Path, tmp_path: Path
) -> None:
    words = ("optimize", folder, "--data", rows, "--batch-size", 4, "--no-bench")
    loose = (*words, "--budget", "relative_error<=0.3", "--out")
    done = run(*loose, tmp_path / "out", "--format", "hf")
    assert done.code == 0, done.err
    config = transformers.AutoConfig.from_pretrained(tmp_path / "out" / "hf")
    assert (config.num_hidden_layers, config.intermediate_size) < (3, 48)
    done = run(*loose, tmp_path / "none", "--format", "hf", "--reduce", "prune_channels")
    assert done.code == 9
    assert "mlp.fc1.bias: has 2 different shapes in 3 layers" in done.err
    assert "drop_layers and prune_channels(together=True)" in done.err
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
