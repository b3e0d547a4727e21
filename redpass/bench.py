"""Latency of two programs, measured in turn, so that what else the machine does hits both."""

from __future__ import annotations

import os
import platform
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from redpass import export
from redpass.errors import RedpassError, UsageError, nearest
from redpass.program import Program
from redpass.record import LatencyRecord
from redpass.runtime.onnx import OnnxModel
from redpass.verify.inputs import random_inputs

Call = Callable[[dict[str, Tensor]], Any]
Sizes = Mapping[str, int]

RUNNERS = ("eager", "compile", "onnxruntime")
WARM_UP = 3
SHORTEST = 0.02
"""Seconds a measured stretch lasts at least: calls are repeated to fill it."""


@dataclass(frozen=True)
class BenchTable:
    """Rows of a comparison and the machine they were measured on.

    Attributes:
        rows: one for each runner at each sizes; a runner that failed says why.
        machine: processor, threads, versions, and the load before and after.
    """

    rows: tuple[LatencyRecord, ...]
    machine: Mapping[str, str]

    def to_json(self) -> dict[str, Any]:
        """Returns plain data."""
        return {"rows": [asdict(row) for row in self.rows], "machine": dict(self.machine)}


def compare(
    original: Program,
    optimized: Program,
    *,
    runners: Sequence[str] = RUNNERS,
    sizes: Sequence[Sizes] | None = None,
    rounds: int = 20,
    threads: int | None = None,
) -> BenchTable:
    """Measures both programs in turn, round after round, in each runner.

    A round takes each once; the ratio is the median of the rounds' ratios, the spread their
    quartiles. Times are wall time. Both get the same inputs, the second its own state: it may keep
    fewer caches, and smaller ones.

    Args:
        runners: any of `eager`, `compile` (torch.compile for dynamic sizes), `onnxruntime`.
        sizes: dimension name -> size, one for each row; None for `usual_sizes`.
        rounds: how often each is measured.
        threads: of one operator; None for PyTorch's own number.

    Raises:
        UsageError: an unknown runner, fewer than three rounds, or two that are not of one model.
        ExportError: weights without data.
    """
    _check(runners, rounds)
    _check_inputs(original, optimized)
    count = threads or torch.get_num_threads()
    chosen = list(sizes) if sizes is not None else usual_sizes(original)
    before = machine(count)
    rows: list[LatencyRecord] = []
    with _threads(count), tempfile.TemporaryDirectory() as folder:
        for runner in runners:
            try:
                calls = [
                    _call(runner, program, Path(folder) / f"{number}.onnx", count)
                    for number, program in enumerate((original, optimized))
                ]
            except Exception as error:
                rows += [_failed(runner, size, error) for size in chosen]
                continue
            rows += [_row(runner, calls, (original, optimized), size, rounds) for size in chosen]
    return BenchTable(tuple(rows), before | _after(before, count))


def quick(original: Program, optimized: Program) -> list[LatencyRecord]:
    """Returns eager and ONNX Runtime rows from few rounds, for the end of a run."""
    table = compare(original, optimized, runners=("eager", "onnxruntime"), rounds=9)
    return list(table.rows)


def usual_sizes(program: Program) -> list[dict[str, int]]:
    """Returns the sizes programs are measured at: a sequence of 128, and a step of decoding."""
    dims = program.signature.dims
    if not dims:
        return [{}]
    found = [_clipped(program, {"batch": 1, "seq": 128, "past": 0})]
    if "past" in dims:
        found.append(_clipped(program, {"batch": 1, "seq": 1, "past": 128}))
    elif "seq" not in dims:
        found.append(_clipped(program, {"batch": 8}))
    return found


def machine(threads: int) -> dict[str, str]:
    """Returns what a latency depends on besides the model."""
    facts = {"cpu": _processor(), "cores": str(os.cpu_count() or 1), "threads": str(threads)}
    for name in ("torch", "onnxruntime-gpu", "onnxruntime", "onnx"):
        try:
            facts[name] = version(name)
        except PackageNotFoundError:
            continue
    facts["python"] = platform.python_version()
    if hasattr(os, "getloadavg"):
        facts["load"] = f"{os.getloadavg()[0]:.1f}"
    return facts


def _after(before: Mapping[str, str], threads: int) -> dict[str, str]:
    if "load" not in before:
        return {}
    after = machine(threads)["load"]
    found = {"load": f"{before['load']} before, {after} after"}
    # Our own threads are part of the load that is left behind.
    if max(float(before["load"]), float(after) - threads) > (os.cpu_count() or 1):
        found["warning"] = "more work than cores: times are too long, ratios uncertain"
    return found


def _check(runners: Sequence[str], rounds: int) -> None:
    for runner in runners:
        if runner not in RUNNERS:
            raise UsageError(f"unknown runner '{runner}'", hint=nearest(runner, RUNNERS))
    if rounds < 3:
        raise UsageError(f"{rounds} rounds give no quartiles", hint="ask for at least 3")


def _check_inputs(original: Program, optimized: Program) -> None:
    known = [port.name for port in original.signature.inputs]
    allowed = {*known, *(name for name, _ in optimized.signature.state)}
    new = [port.name for port in optimized.signature.inputs if port.name not in allowed]
    if new:
        raise UsageError(
            f"the second takes inputs that the first has not: {', '.join(new)}",
            place=optimized.origin.path,
            hint=f"compare a model with what was made of it; the first takes {', '.join(known)}",
        )


def _clipped(program: Program, wanted: Mapping[str, int]) -> dict[str, int]:
    limits = program.signature.dims
    found = {}
    for name, size in wanted.items():
        if name in limits:
            low, high = limits[name]
            found[name] = max(low, size if high is None else min(size, high))
    return found


def _call(runner: str, program: Program, path: Path, threads: int) -> Call:
    if runner == "onnxruntime":
        export.to_onnx(program, path)
        return OnnxModel(path, threads=threads)
    names = [port.name for port in program.signature.inputs]
    module: Any = program.module
    if runner == "compile":
        module = torch.compile(module, dynamic=True)

    def call(values: dict[str, Tensor]) -> Any:
        with torch.no_grad():
            return module(*(values[name] for name in names))

    return call


def _row(
    runner: str, calls: Sequence[Call], programs: Sequence[Program], sizes: Sizes, rounds: int
) -> LatencyRecord:
    inputs = _inputs(programs[0], programs[1], sizes)
    try:
        first, second = _alternate(calls, inputs, rounds)
    except Exception as error:
        return _failed(runner, sizes, error)
    ratios = [after / before for before, after in zip(first, second, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return LatencyRecord(
        runner=runner,
        sizes=_words(sizes),
        original_ms=1000 * statistics.median(first),
        optimized_ms=1000 * statistics.median(second),
        ratio=middle,
        spread=(low, high),
    )


def _inputs(original: Program, optimized: Program, sizes: Sizes) -> list[dict[str, Tensor]]:
    first = random_inputs(original, dict(sizes))
    state = {name for name, _ in optimized.signature.state}
    own = {n: value for n, value in random_inputs(optimized, dict(sizes)).items() if n in state}
    names = [port.name for port in optimized.signature.inputs]
    return [first, {name: (first | own)[name] for name in names}]


def _alternate(
    calls: Sequence[Call], inputs: Sequence[dict[str, Tensor]], rounds: int
) -> tuple[list[float], list[float]]:
    """Returns seconds a call of each, round by round; who goes first is drawn by lot."""
    for call, values in zip(calls, inputs, strict=True):
        for _ in range(WARM_UP):
            call(values)
    repeats = max(1, round(SHORTEST / max(_seconds(calls[0], inputs[0], 1), 1e-7)))
    order, lot = [0, 1], random.Random(0)
    found: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds):
        lot.shuffle(order)
        for which in order:
            found[which].append(_seconds(calls[which], inputs[which], repeats))
    return found


def _seconds(call: Call, values: dict[str, Tensor], repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        call(values)
    return (time.perf_counter() - start) / repeats


def _failed(runner: str, sizes: Sizes, error: Exception) -> LatencyRecord:
    text = error.found if isinstance(error, RedpassError) else str(error).strip()
    first = (text.splitlines() or [""])[0][:200]
    nan = float("nan")
    reason = f"{type(error).__name__}: {first}"
    return LatencyRecord(runner, _words(sizes), nan, nan, nan, (nan, nan), reason)


def _words(sizes: Sizes) -> str:
    return ", ".join(f"{name} {size}" for name, size in sizes.items()) or "as traced"


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            lines = [line for line in file if line.startswith("model name")]
        return lines[0].partition(":")[2].strip()
    except (OSError, IndexError):
        return platform.processor() or platform.machine()
