"""`.pt2` files: loaded without redpass, at other sizes, under the public names."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from redpass.errors import ExportError
from redpass.export import to_pt2
from redpass.program import Program
from redpass.verify.inputs import random_inputs

ELSEWHERE = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "redpass":
            raise ImportError("redpass is not here")

sys.meta_path.insert(0, Refuse())
import torch

module = torch.export.load(sys.argv[1]).module()
for case in torch.load(sys.argv[2], weights_only=True):
    with torch.no_grad():
        found = module(case["inputs"])
    assert list(found) == list(case["outputs"]), list(found)
    for name, wanted in case["outputs"].items():
        torch.testing.assert_close(found[name], wanted, rtol=1e-5, atol=1e-6)
    print("ran", *case["sizes"])
assert not any(name.partition(".")[0] == "redpass" for name in sys.modules)
"""


def test_it_loads_without_redpass_and_runs_at_other_sizes(llama: Program, tmp_path: Path) -> None:
    report = to_pt2(llama, tmp_path / "model.pt2")
    assert max(report.worst.values()) <= 1
    cases = []
    for sizes in ((1, 1, 0), (3, 7, 0), (2, 1, 9), (1, 1, 1), (1, 13, 4)):
        values = random_inputs(llama, dict(zip(("batch", "seq", "past"), sizes, strict=True)))
        names = [port.name for port in llama.signature.outputs]
        outputs = dict(zip(names, llama(**values), strict=True))
        cases.append({"sizes": list(sizes), "inputs": values, "outputs": outputs})
    torch.save(cases, tmp_path / "cases.pt")
    command = [sys.executable, "-I", "-c", ELSEWHERE, "model.pt2", "cases.pt"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:2] == ["ran 1 1 0", "ran 3 7 0"]


def test_the_original_weights_are_not_copied_or_changed(residual: Program, tmp_path: Path) -> None:
    before = {name: tensor.clone() for name, tensor in residual.weights.items()}
    text = residual.text
    to_pt2(residual, tmp_path / "model.pt2")
    assert residual.text == text
    assert all(torch.equal(before[name], t) for name, t in residual.weights.items())


def test_dimensions_keep_their_ranges(llama: Program, tmp_path: Path) -> None:
    to_pt2(llama, tmp_path / "model.pt2")
    ranges = torch.export.load(tmp_path / "model.pt2").range_constraints
    assert {str(symbol): int(bounds.lower) for symbol, bounds in ranges.items()} == {
        "batch": 1, "seq": 1, "past": 0,
    }  # fmt: skip


def test_weights_without_data_are_refused(residual: Program, tmp_path: Path) -> None:
    fake = replace(residual, weights={k: v.to("meta") for k, v in residual.weights.items()})
    with pytest.raises(ExportError, match=r"model\.pt2: the weights carry no data"):
        to_pt2(fake, tmp_path / "model.pt2")
    assert not list(tmp_path.iterdir())


def test_a_file_that_computes_something_else_is_found(
    residual: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = replace(residual, weights={k: 1.01 * v for k, v in residual.weights.items()})
    from redpass.export import pt2

    wrong = pt2.exported_program(other)
    monkeypatch.setattr(pt2, "exported_program", lambda _: wrong)
    with pytest.raises(ExportError, match=r"gives other results .* output 'output_0': error"):
        to_pt2(residual, tmp_path / "model.pt2")
