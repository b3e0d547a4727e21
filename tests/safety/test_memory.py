"""Limits on memory: told before anything that would crash is imported, with the need."""

from __future__ import annotations

import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from redpass.checks import memory
from redpass.errors import DataError, ResourceError

MIB = 1 << 20


@pytest.fixture
def model(tmp_path: Path) -> Path:
    import torch

    torch.save(torch.nn.Linear(4, 4), tmp_path / "model.pt")
    return tmp_path / "model.pt"


@pytest.mark.parametrize("limit", [300, 700, 1500])
def test_a_limit_that_is_too_small_states_the_need(model: Path, limit: int) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "redpass", "optimize", model, "--out", model.with_name("out")],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit * MIB, limit * MIB)),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 10, done.stderr
    assert re.match(
        rf"error\[memory\]: .*model\.pt: needs about \d+ MiB of address space, the limit is {limit}"
        r" MiB\n  raise the limit",
        done.stderr,
    )
    assert [path.name for path in model.parent.iterdir()] == ["model.pt"]


def test_the_need_grows_with_the_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_limit", lambda: memory.BASE + 100 * memory.PER_BYTE)
    (tmp_path / "a.pt").write_bytes(b"x" * 100)
    memory.check(tmp_path / "a.pt")
    (tmp_path / "a.pt").write_bytes(b"x" * 101)
    with pytest.raises(ResourceError, match="address space"):
        memory.check(tmp_path / "a.pt")


def test_weights_larger_than_what_is_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free", lambda: 3 * MIB)
    (tmp_path / "model.safetensors").write_bytes(b"x" * (4 * MIB))
    with pytest.raises(ResourceError, match="needs at least 4 MiB of memory, 3 MiB are free"):
        memory.check(tmp_path)


@pytest.mark.parametrize(
    "error",
    [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to "
     "allocate 2097152 bytes."), RuntimeError("std::bad_alloc")],
)  # fmt: skip
def test_words_of_libraries_are_understood(error: Exception) -> None:
    told = memory.told(error)
    assert told is not None
    assert (": 3 MiB more were needed" in told.found) == ("2097152" in str(error))
    assert told.hint


def test_arrays_that_unpack_to_more_than_is_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import numpy as np

    from redpass.frontend import batches

    np.savez_compressed(tmp_path / "rows.npz", x=np.zeros((4, 1 << 19), np.float32))
    assert batches.read_rows(tmp_path / "rows.npz", limit=1)["x"].shape == (1, 1 << 19)
    monkeypatch.setattr(memory, "free", lambda: 7 * MIB)
    with pytest.raises(DataError, match="unpacks to 8 MiB, 7 MiB are free"):
        batches.read_rows(tmp_path / "rows.npz", limit=1)


def test_other_errors_are_not_about_memory() -> None:
    assert memory.told(ValueError("no")) is None
