"""`redpass analyze`: tables by layer and branch, JSON, maps; and reasons where there is nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from commands import Files, Run

import redpass
from redpass.cli import sources


def test_json_holds_every_measure(run: Run, files: Files) -> None:
    data = json.loads(run("analyze", files.model, "--data", files.data, "--json").out)
    layers = {layer["label"]: layer for layer in data["layers"]}
    assert list(layers) == [f"layers.{number}" for number in range(4)]
    assert layers["layers.1"]["influence"] == pytest.approx(0.0, abs=1e-9)
    assert layers["layers.1"]["macro_influence"] == pytest.approx(0.0, abs=1e-9)
    assert layers["layers.0"]["influence"] > layers["layers.2"]["influence"] > 1e-9
    last = layers["layers.3"]
    assert last["macro_influence"] == pytest.approx(last["influence"], abs=1e-6)
    assert all(branch["entropy"] is not None for branch in data["branches"])
    titles = [matrix["title"] for matrix in data["matrices"]]
    assert titles[1:] == [
        "Linear CKA between layers (exact)",
        "Angular distance over spans of layers",
    ]
    spans = data["matrices"][2]["values"]
    assert spans[3] == [spans[3][0], None, None, None]


def test_tables_and_page_show_layers(run: Run, files: Files, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    found = run("analyze", files.model, "--data", files.data, "--report", page)
    assert found.code == 0, found.err
    for text in ("block influence", "macro influence", "entropy", "Linear CKA", "Angular distance"):
        assert text in found.out
    for text in ("Influence of layers", "Influence of branches", "first layer of the span"):
        assert text in page.read_text()


class Plain(torch.nn.Module):
    """A linear without a skip connection."""

    def __init__(self) -> None:
        super().__init__()
        self.map = torch.nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.map(x)


def test_model_without_layers_says_why(
    run: Run, files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    specs = ["x:float32[batch,seq,8]"]
    program = redpass.load(Plain(), example={"x": torch.randn(2, 5, 8)}, inputs=specs)
    monkeypatch.setattr(sources, "load", lambda *_, **__: program)
    monkeypatch.setattr(sources, "read", lambda *_: batches(program))
    found = run("analyze", files.model, "--data", files.data)
    assert found.code == 0, found.err
    assert "note: no residual stream with branches was found" in found.out
    data = json.loads(run("analyze", files.model, "--data", files.data, "--json").out)
    assert data["layers"] == data["branches"] == data["matrices"] == []


def batches(program: redpass.Program) -> redpass.Batches:
    name = program.signature.inputs[0].name
    return redpass.Batches(tuple({name: torch.randn(2, 5, 8)} for _ in range(4)))
