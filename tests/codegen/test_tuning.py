"""Timings on disk: what counts, what is ignored and why, and when a kernel is said to win."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from redpass.codegen import tuning
from redpass.codegen.ops import add_norm
from redpass.codegen.ops.op import Config
from redpass.codegen.tuning import Device, Records, Shape, Timing

CARD = Device("NVIDIA H100 80GB HBM3", "580.1")
SHAPE = Shape("add_norm", "ab" * 32, "('bfloat16', 4000)", (2000, 4000))
BEST = Config.of(warps=8, BLOCK=4096)
TIMING = Timing(SHAPE.bucket, BEST.options(), 10.0, "torch.compile", 15.0)


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What is logged during the test, by a process that has said nothing yet."""
    found: list[str] = []
    handler = logging.Handler()
    monkeypatch.setattr(handler, "emit", lambda record: found.append(record.getMessage()))
    monkeypatch.setattr(tuning, "_said", set())
    logger = logging.getLogger("redpass")
    logger.addHandler(handler)
    yield found
    logger.removeHandler(handler)


def timed(rows: int, micros: float, rival: float = 10.0, warps: int = 4) -> Timing:
    config = Config.of(warps=warps, BLOCK=4096).options()
    return Timing(at(rows), config, micros, "torch.compile", rival)


def at(rows: int) -> Shape:
    return replace(SHAPE, sizes=(rows, 4096))


def records(*timings: Timing, device: Device | None = CARD) -> Records:
    return Records(device, {timing.shape: timing for timing in timings})


@given(size=st.integers(0, 1 << 40))
def test_buckets_are_powers_of_two_above(size: int) -> None:
    bucket = tuning.round_up(size)
    assert bucket >= size
    assert bucket & (bucket - 1) == 0
    assert bucket // 2 < max(size, 1)


def test_what_was_written_is_read(tmp_path: Path) -> None:
    path = tuning.write(tmp_path, CARD, [TIMING])
    found = tuning.read(tmp_path, CARD)
    assert path.parent == tmp_path
    assert found.timings == {TIMING.shape: TIMING}
    assert found.trouble == ""
    assert [file.name for file in tmp_path.iterdir()] == [CARD.file]


def test_a_second_write_keeps_what_is_there(tmp_path: Path) -> None:
    tuning.write(tmp_path, CARD, [timed(16, 5.0), timed(32, 5.0)])
    tuning.write(tmp_path, CARD, [timed(32, 4.0)])
    found = tuning.read(tmp_path, CARD).timings.values()
    assert sorted(timing.micros for timing in found) == [4.0, 5.0]


def test_another_device_or_driver_has_another_file(tmp_path: Path) -> None:
    tuning.write(tmp_path, CARD, [TIMING])
    for other in (Device(CARD.name, "590.2"), Device("NVIDIA H200", CARD.driver)):
        assert other.file != CARD.file
        assert not tuning.read(tmp_path, other).timings


def spoiled(text: str) -> dict[str, str]:
    data = json.loads(text)
    item = data["timings"][0]

    def with_item(**change: Any) -> str:
        return json.dumps(data | {"timings": [item | change]})

    return {
        "truncated": text[: len(text) // 2],
        "empty": "",
        "not JSON": "\x00\xff",
        "a list": "[]",
        "another format": json.dumps(data | {"format": "redpass-tuning-0"}),
        "another device": json.dumps(data | {"device": "NVIDIA H200"}),
        "no timings": json.dumps({k: v for k, v in data.items() if k != "timings"}),
        "time zero": with_item(micros=0),
        "time NaN": with_item(micros=float("nan")),
        "a size in words": with_item(config={"num_warps": "4", "num_stages": 1}),
        "a config without warps": with_item(config={"num_stages": 1}),
        "a shape without op": with_item(shape={"sizes": []}),
        "nested too deep": "[" * 100_000,
    }


KINDS = list(spoiled(json.dumps({"format": "", "device": "", "driver": "", "timings": [{}]})))


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_file_is_ignored_and_said_once(
    kind: str, tmp_path: Path, said: list[str]
) -> None:
    path = tuning.write(tmp_path, CARD, [TIMING])
    path.write_text(spoiled(path.read_text())[kind])
    first, _ = tuning.read(tmp_path, CARD), tuning.read(tmp_path, CARD)
    assert first.config(SHAPE) is None
    assert first.verdict(SHAPE)[0] is False
    assert len(said) == 1
    assert f"{path} is ignored" in said[0]


def test_a_damaged_file_is_replaced_by_the_next_write(tmp_path: Path) -> None:
    path = tuning.write(tmp_path, CARD, [TIMING])
    path.write_text("{")
    tuning.write(tmp_path, CARD, [TIMING])
    assert tuning.read(tmp_path, CARD).timings


def test_a_huge_file_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tuning.write(tmp_path, CARD, [TIMING])
    monkeypatch.setattr(tuning, "LARGEST", 10)
    assert "more than 10 bytes" in tuning.read(tmp_path, CARD).trouble


def test_a_folder_in_place_of_the_file_is_ignored(tmp_path: Path) -> None:
    (tmp_path / CARD.file).mkdir()
    assert tuning.read(tmp_path, CARD).trouble


def test_another_kernel_source_has_no_figures() -> None:
    known = records(timed(16, 5.0))
    changed = replace(SHAPE, digest="cd" * 32)
    assert known.config(changed) is None
    assert known.verdict(changed) == (False, f"not measured on {CARD.name}")


def test_the_bucket_decides_then_the_nearest() -> None:
    known = records(timed(16, 5.0, warps=1), timed(2048, 5.0, warps=8))
    found = {rows: known.config(at(rows)) for rows in (9, 40, 1000, 2000)}
    assert [config.warps for config in found.values() if config] == [1, 1, 8, 8]
    assert known.config(SHAPE) == BEST


@pytest.mark.parametrize(
    ("micros", "wins"),
    [
        ([5.0, 5.0], True),
        ([9.8, 9.8], False),  # faster, but within the scatter of timings
        ([5.0, 10.2], True),  # one shape even, the other clearly faster
        ([2.0, 10.4], False),  # one shape slower
        ([11.0], False),
    ],
)
def test_a_kernel_wins_where_it_is_faster_and_nowhere_slower(
    micros: list[float], wins: bool
) -> None:
    known = records(*(timed(16 << place, time) for place, time in enumerate(micros)))
    found, reason = known.verdict(SHAPE)
    assert found is wins
    assert CARD.name in reason
    assert f"{max(micros) / 10:.2f}" in reason


def test_without_a_gpu_nothing_is_measured() -> None:
    assert records(device=None).verdict(SHAPE) == (
        False,
        "no GPU: kernels were not measured on this device",
    )
    assert tuning.read(Path("/nowhere"), None) == Records()


def test_the_shape_of_a_call_is_read_off_its_arguments() -> None:
    label, arguments = next(iter(add_norm.OP.samples(torch.float16)))
    found = Shape.of(add_norm.OP, arguments)
    assert found.sizes == (4, 2048, 4096) * 2 + (4096,), label
    assert found.digest == tuning.source_digest(add_norm.OP)
    assert len(found.digest) == 64
    assert found.place == Shape.of(add_norm.OP, (arguments[0][:1], *arguments[1:])).place
    wider = (*(a[..., :4000] for a in arguments[:3]), *arguments[3:])
    assert found.place != Shape.of(add_norm.OP, wider).place


def test_the_cache_folder_follows_xdg(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert tuning.cache_folder() == tmp_path / "redpass" / "tuning"
    assert tuning.cache_folder(Path("given")) == Path("given")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert tuning.cache_folder() == Path.home() / ".cache" / "redpass" / "tuning"
