"""The GPU benchmark without a GPU: its accounting, its shapes, its table, and what it refuses."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import gpu  # noqa: E402
import gpu_cases  # noqa: E402

from redpass.codegen import tuning  # noqa: E402
from redpass.codegen.ops import OPS  # noqa: E402
from redpass.codegen.ops.checking import disagreement  # noqa: E402

SMALL = gpu_cases.Maker(torch.float32, "cpu", 256)


@pytest.fixture(scope="module")
def cases() -> list[gpu_cases.Case]:
    return list(gpu_cases.cases(SMALL))


def test_every_op_is_timed_in_decoding_and_those_of_prefill_there_too(
    cases: list[gpu_cases.Case],
) -> None:
    assert {case.op.name for case in cases} == set(OPS)
    assert len({(case.op.name, case.label) for case in cases}) == len(cases)
    labels = [case.label for case in cases]
    assert sum("prefill" in label for label in labels) == 4
    assert sum("decode" in label for label in labels) == 12


def test_kernels_take_every_case(cases: list[gpu_cases.Case]) -> None:
    assert {case.op.refuses(*case.arguments) for case in cases} == {""}
    assert all(case.op.pays(*case.arguments) for case in cases)


def test_every_case_runs_and_its_rival_has_the_same_result(cases: list[gpu_cases.Case]) -> None:
    """Where the rewrite is exact; clusters and latents are approximations of their rivals."""
    exact = ("add_norm", "gated_feed_forward", "rotary")
    for case in cases:
        found, rival = case.op.reference(*case.arguments), case.rival()
        if case.op.name not in exact:
            assert rival.shape == found.shape
            continue
        found = found[1] if case.op.name == "add_norm" else found
        rivals = rival if isinstance(rival, tuple) else (rival,)
        for new, old in zip(found if isinstance(found, tuple) else (found,), rivals, strict=True):
            torch.testing.assert_close(new, old, rtol=1e-4, atol=1e-4)


def case_of(cases: list[gpu_cases.Case], op: str, part: str = "") -> gpu_cases.Case:
    return next(case for case in cases if case.op.name == op and part in case.label)


def test_bytes_and_operations_are_counted(cases: list[gpu_cases.Case]) -> None:
    """By hand, at the shrunken sizes: width 16, inner 56, rank 4, past 16 and 128."""
    norm = case_of(cases, "add_norm", "16 rows")
    assert norm.bytes == 4 * (4 * 16 * 16 + 16)
    ffn = case_of(cases, "gated_feed_forward", "16 rows, 16 to 56")
    assert ffn.bytes == 4 * (16 * 16 + 2 * 56 * 16 + 16 * 56)
    assert ffn.operations == 2 * 2 * 16 * 16 * 56
    thin = case_of(cases, "low_rank_linear", "1 rows")
    assert thin.bytes == 4 * (16 + 2 * 4 * 16 + 16)
    assert thin.operations == 2 * (16 * 4 + 4 * 16)
    decode = case_of(cases, "clustered_attention", "batch 16, 16 past, 8 clusters")
    keys, values = 8 * 16 * 128, 32 * 16 * 128
    assert decode.bytes == 4 * 16 * (keys + values + 8 * 128 + 32 * 128)
    prefill = case_of(cases, "clustered_attention", "prefill 8, 16 clusters")
    pairs = sum(range(1, 9))
    assert prefill.operations == 2 * 128 * pairs * (16 + 32)
    latent = case_of(cases, "latent_attention", "batch 1, 16 past")
    full = 2 * 32 * 16 * 128
    held = 16 * 8 * (256 + 256)
    assert held == full // 2, "half the cache"
    assert latent.bytes > 4 * held


def test_the_floor_is_the_larger_of_two(cases: list[gpu_cases.Case]) -> None:
    case = replace(cases[0], bytes=3_000_000, operations=8_000_000)
    assert gpu_cases.floor(case, gpu_cases.Rates(3e12, 8e14)) == pytest.approx(1.0)
    assert gpu_cases.floor(case, gpu_cases.Rates(3e12, 4e12)) == pytest.approx(2.0)


class Clock:
    """A timer that calls nothing and counts up."""

    def __init__(self, *micros: float) -> None:
        self.micros = list(micros)

    def __call__(self, call: Callable[[], Any]) -> float:
        return self.micros.pop(0)


def test_rates_come_from_a_copy_and_a_product() -> None:
    rates = gpu.measure_rates(Clock(100.0, 50.0), SMALL)
    assert rates.bandwidth == pytest.approx(2 * (gpu.COPIED // 256) / 100e-6)
    assert rates.operations == pytest.approx(2 * (gpu.SIDE // 256) ** 3 / 50e-6)


def as_reference(case: gpu_cases.Case) -> gpu_cases.Case:
    """The case with its reference as the kernel, one configuration only."""
    reference, config = case.op.reference, case.op.configs(*case.arguments)[0]
    op = replace(case.op, launch=lambda _, *given: reference(*given), configs=lambda *_: (config,))
    return replace(case, op=op)


@pytest.fixture
def _plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr(tuning, "source_digest", lambda op: "ab" * 32)


@pytest.mark.usefixtures("_plain")
def test_a_case_is_timed_against_both_rivals(cases: list[gpu_cases.Case]) -> None:
    timings: list[tuning.Timing] = []
    # The unrewritten op, torch.compile, the kernel, eager, torch.compile again.
    clock = Clock(30.0, 20.0, 10.0, 40.0, 21.0)
    rates = gpu_cases.Rates(1e12, 1e15)
    row = gpu.measure(as_reference(cases[0]), clock, rates, timings)
    assert (row.kernel, row.rewritten, row.compiled) == (10.0, 30.0, 20.0)
    assert row.cells[6:8] == ("3.00", "2.00")
    (timing,) = timings
    assert (timing.micros, timing.rival, timing.rival_micros) == (10.0, "torch.compile", 21.0)


@pytest.mark.usefixtures("_plain")
def test_a_kernel_that_is_wrong_is_a_note_and_no_figure(cases: list[gpu_cases.Case]) -> None:
    case = as_reference(cases[0])

    def wrong(options: dict[str, int], *given: Any) -> Any:
        return tuple(torch.zeros_like(t) for t in case.op.reference(*given))

    assert disagreement(case.op, case.arguments, wrong({}, *case.arguments))
    row = gpu.measure(
        replace(case, op=replace(case.op, launch=wrong)),
        Clock(30.0, 20.0),
        gpu_cases.Rates(1e12, 1e15),
        [],
    )
    assert math.isnan(row.kernel)
    assert row.note == "no configuration works"
    assert row.cells[2] == row.cells[6] == row.cells[8] == "-"


@pytest.mark.usefixtures("_plain")
def test_a_shape_that_no_kernel_takes_is_a_note(cases: list[gpu_cases.Case]) -> None:
    case = replace(cases[0], op=replace(cases[0].op, refuses=lambda *_: "too wide"))
    row = gpu.measure(case, Clock(30.0, 20.0), gpu_cases.Rates(1e12, 1e15), [])
    assert row.note == "refused: too wide"


def test_the_table_says_what_it_was_measured_on() -> None:
    row = gpu.Row("add_norm", "16 rows", 10.0, 30.0, "add, rms_norm", 20.0, 8.0)
    about = {"GPU": "NVIDIA H100 80GB HBM3", "torch": "2.11.0"}
    text = gpu.markdown([row], gpu_cases.Rates(3.0e12, 7.98e14), about)
    assert "- GPU: NVIDIA H100 80GB HBM3" in text
    assert "- copy: 3.00 TB/s" in text
    assert "- GEMM: 798 TFLOP/s" in text
    line = next(line for line in text.split("\n") if line.startswith("| add_norm"))
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells == [
        "add_norm", "16 rows", "10.0", "30.0", "20.0", "8.0", "3.00", "2.00", "80%",
        "add, rms_norm", "",
    ]  # fmt: skip
    assert len(cells) == len(gpu.HEAD)


def test_end_to_end_is_a_table_of_its_own() -> None:
    text = gpu.model_table([("batch 1, seq 1, past 4096", 20_000.0, 16_000.0)])
    assert "| batch 1, seq 1, past 4096 | 20.00 | 16.00 | 1.25 |" in text


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_and_writes_nothing(tmp_path: Path) -> None:
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.strip().startswith("no CUDA GPU here: nothing was measured")
    assert not (tmp_path / "out").exists()
