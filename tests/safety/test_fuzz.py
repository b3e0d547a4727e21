"""A sample of the fuzzing of benchmarks/fuzz.py, and that the harness sees what it looks for."""

from __future__ import annotations

import os
import random
import signal
from pathlib import Path

import formats
import fuzzing
import mutations
import pytest

from redpass.errors import LoadError

pytestmark = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux")
COUNTS = {"pt2": 20, "safetensors": 40, "config": 60}


@pytest.mark.parametrize("name", formats.FORMATS)
def test_damaged_files_are_read_or_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "good").mkdir()
    form = formats.FORMATS[name](tmp_path / "good")
    with fuzzing.quiet():
        found = fuzzing.fuzz(form, range(COUNTS.get(name, 100)), tmp_path)
    assert found.bad == []
    assert found.counts["refused"] or name == "journal"
    assert found.counts["read"]


def _read(path: Path) -> None:
    text = path.read_bytes()
    if text == b"crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if text == b"loop":
        while True:
            pass
    if text == b"fault":
        raise ZeroDivisionError("not told")
    if text == b"refuse":
        raise LoadError("no good", file=path, hint="fetch it again")
    if text == b"paint":
        error = LoadError("no good")
        error.args = ("\x1b[31m",)
        error.found = "\x1b[31mred"
        raise error
    if text == b"grow":
        bytearray(64 << 30)


@pytest.mark.parametrize(
    ("text", "how"),
    [(b"crash", "signal"), (b"loop", "hang"), (b"fault", "untyped"), (b"refuse", "refused"),
     (b"paint", "unprintable"), (b"grow", "untyped"), (b"fine", "read")],
)  # fmt: skip
def test_the_harness_sees(
    text: bytes, how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fuzzing, "SECONDS", 0.3)
    (tmp_path / "sample").write_bytes(b"")
    form = fuzzing.Format("own", [(tmp_path / "sample", "")], [lambda *_: text], _read)
    with fuzzing.quiet():
        found = fuzzing.fuzz(form, range(3), tmp_path)
    assert found.counts == {how: 3}
    assert len(found.bad) == (0 if how in ("refused", "read") else 3)


def test_a_case_is_made_again_from_its_number(tmp_path: Path) -> None:
    (tmp_path / "good").mkdir()
    form = formats.FORMATS["manifest"](tmp_path / "good")
    texts = [
        [(fuzzing.make(form, 0, n, tmp_path) / "manifest.json").read_bytes() for n in range(30)]
        for _ in range(2)
    ]
    assert texts[0] == texts[1]
    assert len(set(texts[0])) > 20


@pytest.mark.parametrize("change", mutations.BYTES)
def test_every_way_to_damage_takes_any_file(change) -> None:
    chance = random.Random(0)
    for size in (0, 1, 2, 3, 50):
        for _ in range(50):
            assert isinstance(change(b"x" * size, chance), bytes)
