"""The comparison of two programs' latency."""

from __future__ import annotations

import json
import math
import time
from dataclasses import replace
from typing import Any

import pytest
import torch

from redpass import bench
from redpass.errors import UsageError
from redpass.program import Program


def test_rows_hold_medians_ratio_and_quartiles(residual: Program) -> None:
    table = bench.compare(
        residual, residual, runners=("eager", "onnxruntime"), sizes=[{"batch": 2, "seq": 5}],
        rounds=5, threads=1,
    )  # fmt: skip
    assert [row.runner for row in table.rows] == ["eager", "onnxruntime"]
    for row in table.rows:
        assert row.failure == ""
        assert row.sizes == "batch 2, seq 5"
        assert 0 < row.spread[0] <= row.ratio <= row.spread[1]
        assert row.original_ms > 0
    assert {"cpu", "threads", "torch", "load"} <= set(table.machine)
    assert json.loads(json.dumps(table.to_json()))["rows"][0]["runner"] == "eager"


def test_a_program_twice_as_slow_measures_so(
    residual: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses = iter((0.002, 0.004))

    def call(*_: Any) -> bench.Call:
        pause = next(pauses)
        return lambda _values: time.sleep(pause)

    monkeypatch.setattr(bench, "_call", call)
    table = bench.compare(residual, residual, runners=("eager",), sizes=[{}], rounds=7)
    assert 1.5 < table.rows[0].ratio < 2.5


def test_who_goes_first_is_drawn_by_lot(residual: Program) -> None:
    calls: list[str] = []
    pair = [lambda _: calls.append("a"), lambda _: calls.append("b")]
    monkey = bench.SHORTEST
    try:
        bench.SHORTEST = 0.0
        bench._alternate(pair, [{}, {}], 20)
    finally:
        bench.SHORTEST = monkey
    rounds = ["".join(calls[i : i + 2]) for i in range(2 * bench.WARM_UP + 1, len(calls), 2)]
    assert set(rounds) == {"ab", "ba"}


def test_a_runner_that_fails_is_a_row_with_the_reason(residual: Program) -> None:
    fake = replace(residual, weights={k: v.to("meta") for k, v in residual.weights.items()})
    table = bench.compare(residual, fake, runners=("onnxruntime", "eager"), rounds=3)
    assert "ExportError: the weights carry no data" in table.rows[0].failure
    assert math.isnan(table.rows[0].ratio)


def test_a_compiler_that_fails_is_a_row_too(
    residual: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no C++ compiler\nand more")

    monkeypatch.setattr(torch, "compile", refuse)
    table = bench.compare(residual, residual, runners=("compile",), rounds=3)
    assert table.rows[0].failure == "RuntimeError: no C++ compiler"


def test_a_causal_model_is_also_measured_at_a_step_of_decoding(residual: Program) -> None:
    assert bench.usual_sizes(residual) == [{"batch": 1, "seq": 128}]
    dims = dict(residual.signature.dims) | {"past": (0, 64)}
    causal = replace(residual, signature=replace(residual.signature, dims=dims))
    assert bench.usual_sizes(causal)[1] == {"batch": 1, "seq": 1, "past": 64}


def test_threads_are_put_back(residual: Program) -> None:
    before = torch.get_num_threads()
    bench.compare(residual, residual, runners=("eager",), rounds=3, threads=before + 1)
    assert torch.get_num_threads() == before


def test_wrong_requests_are_refused(residual: Program) -> None:
    with pytest.raises(UsageError, match=r"unknown runner 'egar'\n  did you mean 'eager'"):
        bench.compare(residual, residual, runners=("egar",))
    with pytest.raises(UsageError, match="2 rounds give no quartiles"):
        bench.compare(residual, residual, rounds=2)


def test_two_models_with_other_inputs_are_refused(residual: Program) -> None:
    first, *rest = residual.signature.inputs
    other = replace(residual.signature, inputs=(replace(first, name="other"), *rest))
    with pytest.raises(UsageError, match="the second takes inputs that the first has not: other"):
        bench.compare(residual, replace(residual, signature=other), runners=("eager",))


def test_load_above_the_cores_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    monkeypatch.setattr("os.getloadavg", lambda: (7.0, 7.0, 7.0))
    busy = bench.machine(1)
    assert "uncertain" in bench._after(busy, 1)["warning"]
    monkeypatch.setattr("os.getloadavg", lambda: (0.5, 0.5, 0.5))
    assert "warning" not in bench._after(bench.machine(1), 1)
