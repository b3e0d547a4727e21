"""From a model file to a result on disk, with nothing replaced; and runs that are killed."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from commands import Run

from redpass.cli.signals import Stopped
from redpass.manifest import verify_artifact

DEPTH, WIDTH = 4, 16


class Block(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = torch.nn.LayerNorm(WIDTH)
        self.up = torch.nn.Linear(WIDTH, 4 * WIDTH)
        self.down = torch.nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.nn.functional.gelu(self.up(self.norm(x))))


class Blocks(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = torch.nn.ModuleList(Block() for _ in range(DEPTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A `.pt2` with a dynamic batch; its third block does almost nothing."""
    torch.manual_seed(0)
    module = Blocks().eval()
    with torch.no_grad():
        module.blocks[2].down.weight.mul_(0.001)
        module.blocks[2].down.bias.zero_()
    batch = torch.export.Dim("batch")
    program = torch.export.export(
        module, (torch.randn(4, 6, WIDTH),), dynamic_shapes={"x": {0: batch}}, strict=False
    )
    path = tmp_path_factory.mktemp("model") / "blocks.pt2"
    torch.export.save(program, path)
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    path = tmp_path_factory.mktemp("data") / "rows.npz"
    np.savez(path, x=np.random.default_rng(1).normal(size=(64, 6, WIDTH)).astype(np.float32))
    return path


def words(model: Path, data: Path, out: Path) -> list[str]:
    options = ["--data", str(data), "--budget", "relative_error<=0.05", "--out", str(out)]
    return ["optimize", str(model), *options, "--no-bench"]


def test_optimize_then_every_command_on_the_result(
    run: Run, model: Path, data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    found = run(*words(model, data, out)[:-1])
    assert found.code == 0, found.err
    assert "Latency, onnxruntime" in found.out
    verify_artifact(out)
    report = json.loads((out / "report.json").read_text())
    assert report["after"]["parameters"] < report["before"]["parameters"]
    assert report["before"]["file_bytes"] == model.stat().st_size
    session = onnxruntime.InferenceSession(out / "model.onnx", providers=["CPUExecutionProvider"])
    rows = np.load(data)["x"][:5]
    (got,) = session.run(None, {session.get_inputs()[0].name: rows})
    want = torch.export.load(model).module()(torch.from_numpy(rows)).detach().numpy()
    assert np.linalg.norm(got - want) < 0.05 * np.linalg.norm(want)
    told = run("explain", out).out
    assert "drop_branches.similar" in told
    assert "prune_channels.refit" in told
    again = run("replay", out, model, "--data", data, "--out", tmp_path / "again")
    assert again.code == 0, again.err
    benched = run("bench", model, out, "--runners", "eager", "--rounds", "3", "--json")
    assert benched.code == 0, benched.err
    assert json.loads(benched.out)["rows"][0]["ratio"] > 0
    assert run("inspect", out, "--json").code == 0


def test_a_resumed_run_traces_nothing_and_writes_the_same(
    run: Run, model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from redpass import frontend
    from redpass.budget import quality

    def stop(*_: object) -> None:
        if len(stops) == 9:  # some candidates are measured, more are not
            raise Stopped(signal.SIGTERM)
        stops.append(1)

    out, stops, measure = tmp_path / "out", [], quality._measure
    monkeypatch.setattr(quality, "_measure", lambda *a: [stop(), measure(*a)][1])
    assert run(*words(model, data, out)).code == 143
    names = sorted(path.name.rpartition("-")[2] for path in tmp_path.iterdir())
    assert len(names) == 3
    assert names[1:] == ["blocks", "traced"]
    monkeypatch.setattr(quality, "_measure", measure)
    monkeypatch.setattr(frontend, "load", lambda *_, **__: pytest.fail("traced again"))
    found = run(*words(model, data, out), "--resume")
    assert found.code == 0, found.err
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    monkeypatch.undo()
    assert run(*words(model, data, tmp_path / "whole")).code == 0
    assert "prune_channels" in (out / "plan.json").read_text()
    for name in ("plan.json", "model.onnx", "model.pt2"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_run_that_fails_before_its_first_figure_leaves_nothing(
    run: Run, model: Path, data: Path, tmp_path: Path
) -> None:
    found = run(*words(model, data, tmp_path / "out"), "--reduce", "drop_noops")
    assert found.code != 0
    assert not list(tmp_path.iterdir())


def test_single_file_export(run: Run, model: Path, tmp_path: Path) -> None:
    target = tmp_path / "one.onnx"
    found = run("export", model, "--out", target)
    assert found.code == 0, found.err
    assert [path.name for path in tmp_path.iterdir()] == ["one.onnx"]
    onnxruntime.InferenceSession(target, providers=["CPUExecutionProvider"])


@pytest.mark.parametrize(
    ("array", "part"),
    [
        (np.zeros((0, 6, WIDTH), np.float32), "rows"),
        (np.full((64, 6, WIDTH), np.nan, np.float32), "NaN"),
        (np.zeros((64, 6, WIDTH + 1), np.float32), "'x'"),
        (np.zeros((64, 6), np.float32), "'x'"),
        (np.arange(64 * 6 * WIDTH).reshape(64, 6, WIDTH), "'x'"),
        (np.zeros((64, 6, WIDTH), np.float32), "the same row"),
    ],
    ids=["no rows", "NaN", "size", "rank", "dtype", "equal rows"],
)
def test_data_that_cannot_be_used(
    run: Run, model: Path, tmp_path: Path, array: np.ndarray, part: str
) -> None:
    np.savez(tmp_path / "bad.npz", x=array)
    found = run(*words(model, tmp_path / "bad.npz", tmp_path / "out"))
    assert found.code in (2, 5), found.err
    assert "bad.npz" in found.err
    assert part in found.err
    assert [path.name for path in tmp_path.iterdir()] == ["bad.npz"]


def mount(folder: Path, *options: str) -> None:
    command = ["mount", *options, str(folder)]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting a small disk needs root on Linux")


@pytest.mark.slow
@pytest.mark.parametrize("kilobytes", range(152, 760, 64))
def test_disk_that_fills_up(
    run: Run, model: Path, data: Path, tmp_path: Path, kilobytes: int
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount(disk, "-t", "tmpfs", "-o", "size=2m", "tmpfs")
    try:
        out = disk / "out"
        first = run("optimize", model, "--passes", "drop_noops", "--out", out, "--no-bench")
        assert first.code == 0, first.err
        mount(disk, "-o", f"remount,size={kilobytes}k")
        found = run(*words(model, data, out), "--force")
        assert found.code in (0, 8), found.err
        verify_artifact(out)
        passes = json.loads((out / "plan.json").read_text())["passes"]
        assert ("drop_branches" in str(passes)) == (found.code == 0)
        assert found.code == 0 or "the disk is full" in found.err
        left = {path.name for path in disk.iterdir()} - {"out"}
        assert all(name.startswith(".out.journal-") for name in left)  # to go on from
        assert found.code or not left
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_stopped_at_random_moments(model: Path, data: Path, tmp_path: Path, number: int) -> None:
    out, generator = tmp_path / "out", random.Random(int(number))
    command = [sys.executable, "-m", "redpass", *words(model, data, out), "--force"]
    started = time.monotonic()
    subprocess.run(command, check=True, capture_output=True)
    whole = time.monotonic() - started
    old = verify_artifact(out)
    for _ in range(5):
        worker = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(generator.uniform(0.1, whole))
        os.kill(worker.pid, number)
        stopped = time.monotonic()
        worker.wait()
        assert time.monotonic() - stopped < 5
        assert set(verify_artifact(out).files) == set(old.files)
    subprocess.run(command, check=True, capture_output=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
