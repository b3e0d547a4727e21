"""Times every kernel on the GPU of this machine, beside what it takes the place of.

    python benchmarks/gpu.py [--out benchmarks/results] [--no-tests] [--no-model] [--cache DIR]

It runs the tests marked `gpu`, measures what the card copies and multiplies, tunes each kernel at
the shapes of a Llama of 8B (`gpu_cases.py`) and times it against (a) the op it was rewritten from
in PyTorch's best path and (b) `torch.compile` of its reference, medians of device events with the
cache of the card flushed; then a whole model of that shape with random weights, lowered and not.
It writes `gpu.md` and `gpu.json`, and the timings to the tuning cache, which `auto` reads.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))

from gpu_cases import Case, Maker, Rates, cases, floor, percent

import redpass
from redpass.codegen import tuning
from redpass.codegen.folder import versions
from redpass.codegen.ops import register
from redpass.codegen.tune import Timer, device_timer, rivals_of, tune
from redpass.lowering import lower, on_device
from redpass.program import Program
from redpass.verify.inputs import random_inputs

ROOT = Path(__file__).parent.parent
COPIED = 1 << 30
"""Bytes of the tensor that is copied: far more than any cache."""

SIDE = 8192
"""Rows of the square matrices whose product gives the rate of operations."""

MODEL_SIZES: tuple[Mapping[str, int], ...] = (
    {"batch": 1, "seq": 2048, "past": 0},
    {"batch": 1, "seq": 1, "past": 4096},
    {"batch": 16, "seq": 1, "past": 4096},
)


@dataclass(frozen=True)
class Row:
    """One case as measured; times in microseconds, NaN where something did not run."""

    op: str
    case: str
    kernel: float
    rewritten: float
    rewritten_from: str
    compiled: float
    floor: float
    note: str = ""

    @property
    def cells(self) -> tuple[str, ...]:
        """The row as the table shows it."""
        times = (self.kernel, self.rewritten, self.compiled, self.floor)
        shown = [f"{time:.1f}" if math.isfinite(time) else "-" for time in times]
        ratios = [_ratio(other, self.kernel) for other in (self.rewritten, self.compiled)]
        share = percent(self.floor, self.kernel)
        return (self.op, self.case, *shown, *ratios, share, self.rewritten_from, self.note)


HEAD = (
    "op", "case", "kernel µs", "(a) µs", "(b) µs", "floor µs", "(a)/kernel", "(b)/kernel",
    "of floor", "(a) is", "note",
)  # fmt: skip


def _ratio(other: float, kernel: float) -> str:
    return f"{other / kernel:.2f}" if math.isfinite(other / kernel) else "-"


def measure_rates(timer: Timer, maker: Maker) -> Rates:
    """Measures bytes a second read and written by a copy, and operations a second of a GEMM."""
    size = COPIED // maker.shrink
    source = torch.randn(size // 4, device=maker.device)
    target = torch.empty_like(source)
    copied = timer(lambda: target.copy_(source))
    side = SIDE // maker.shrink
    left, right = maker.normal(side, side), maker.normal(side, side)
    multiplied = timer(lambda: left @ right)
    return Rates(2e6 * source.numel() * 4 / copied, 2e6 * side**3 / multiplied)


def measure(case: Case, timer: Timer, rates: Rates, timings: list[tuning.Timing]) -> Row:
    """Tunes and times one case; what fails is a note, and the next case goes on."""
    rivals, noted = rivals_of(case.op, case.arguments), [""]
    rewritten, least = timer(case.rival), floor(case, rates)
    try:
        compiled = timer(rivals["torch.compile"])
    except Exception as error:
        compiled, noted = math.nan, [f"torch.compile: {type(error).__name__}"]
        del rivals["torch.compile"]
    kernel = math.nan
    if refusal := case.op.refuses(*case.arguments):
        noted.append(f"refused: {refusal}")
    elif timing := tune(case.op, case.arguments, timer, rivals):
        timings.append(timing)
        kernel = timing.micros
    else:
        noted.append("no configuration works")
    note = ", ".join(filter(None, noted))
    return Row(case.op.name, case.label, kernel, rewritten, case.rival_name, compiled, least, note)


def markdown(rows: Iterable[Row], rates: Rates, where: Mapping[str, str], tail: str = "") -> str:
    """Returns the table with what it was measured on."""
    lines = ["# Kernels on a GPU", "", "Made by `python benchmarks/gpu.py`.", ""]
    lines += [f"- {key}: {value}" for key, value in where.items()]
    lines += [
        f"- copy: {rates.bandwidth / 1e12:.2f} TB/s read and written",
        f"- GEMM: {rates.operations / 1e12:.0f} TFLOP/s",
        "",
        "(a) is the op before the rewrite in PyTorch's best path, (b) `torch.compile` of the",
        "reference; above 1.00 the kernel is faster. The floor is the larger of bytes over the",
        "copy rate and operations over the GEMM rate, both measured on this card.",
        "",
        "| " + " | ".join(HEAD) + " |",
        "|" + "---|" * len(HEAD),
    ]
    lines += ["| " + " | ".join(row.cells) + " |" for row in rows]
    return "\n".join(lines) + "\n" + tail


def about(device: tuning.Device) -> dict[str, str]:
    """Returns the card, its driver and the versions that the figures depend on."""
    return {
        "GPU": device.name,
        "driver": device.driver,
        "CUDA": str(torch.version.cuda),
    } | versions()


LLAMA: Mapping[str, Any] = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
    "max_position_embeddings": 131072, "rope_theta": 500000.0,
}  # fmt: skip
"""Llama 3 of 8B, as its configuration names the sizes."""


def model(sizes: Mapping[str, Any], dtype: torch.dtype) -> Program:
    """Returns a Llama of these sizes with random weights on the CPU, optimized."""
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(**sizes, dtype=dtype)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        module = transformers.LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)
    return redpass.optimize(redpass.load(module)).program


def model_rows(program: Program, timer: Timer, device: str) -> list[tuple[str, float, float]]:
    """Times a program: (sizes, as it is, with kernels), in microseconds.

    One after the other: both together would need the memory of two.
    """
    found: list[list[float]] = [[] for _ in MODEL_SIZES]
    for current in (program, lower(program, "triton").program):
        moved = on_device(current, device)
        for times, sizes in zip(found, MODEL_SIZES, strict=True):
            values = {k: v.to(device) for k, v in random_inputs(program, sizes).items()}
            times.append(timer(functools.partial(moved, **values)))
    labels = [", ".join(f"{k} {v}" for k, v in sizes.items()) for sizes in MODEL_SIZES]
    return [(label, before, after) for label, (before, after) in zip(labels, found, strict=True)]


def model_table(rows: Iterable[tuple[str, float, float]]) -> str:
    """Returns the end-to-end table."""
    lines = ["", "## A Llama of 8B, random weights, bfloat16, eager", ""]
    lines += ["| sizes | as traced, ms | lowered, ms | ratio |", "|---|---|---|---|"]
    for sizes, before, after in rows:
        lines.append(f"| {sizes} | {before / 1e3:.2f} | {after / 1e3:.2f} | {before / after:.2f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Runs the tests, the kernels and the model, and writes what was found."""
    options = _options()
    device = tuning.this_device()
    if device is None:
        raise SystemExit("no CUDA GPU here: nothing was measured; run this on a machine with one")
    if options.tests:
        command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests/codegen"]
        subprocess.run(command, cwd=ROOT, check=True)
    os.environ["REDPASS_CHECK"] = "rules"  # float64 runs of 8B on the CPU take hours
    run(device, Maker(), device_timer, options.out, options.cache, LLAMA if options.model else None)


def run(
    device: tuning.Device, maker: Maker, timer: Timer, out: Path, cache: Path | None,
    llama: Mapping[str, Any] | None,
) -> None:  # fmt: skip
    """Measures all cases of `maker` and a model, and writes tables and the tuning cache.

    The table is written before the model is run: that takes minutes, and much memory.

    Args:
        out: folder of `gpu.md` and `gpu.json`.
        cache: folder of the timings; the user's cache folder if None.
        llama: sizes of the model, None for no model.
    """
    register()
    timings, rows = list[tuning.Timing](), list[Row]()
    rates, where = measure_rates(timer, maker), about(device)
    for case in cases(maker):
        rows.append(measure(case, timer, rates, timings))
        print(" | ".join(rows[-1].cells), flush=True)
        torch.cuda.empty_cache()
    tuning.write(tuning.cache_folder(cache), device, timings)
    data: dict[str, Any] = {
        "about": where,
        "rates": asdict(rates),
        "rows": [asdict(row) for row in rows],
        "timings": [asdict(timing) for timing in timings],
    }
    write(out, markdown(rows, rates, where), data)
    if llama is not None:
        ends = model_rows(model(llama, maker.dtype), timer, maker.device)
        write(out, markdown(rows, rates, where, model_table(ends)), {**data, "model": ends})
    print((out / "gpu.md").read_text())


def write(out: Path, text: str, data: Mapping[str, Any]) -> None:
    """Writes `gpu.md` and `gpu.json`; what was not measured is null there."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "gpu.md").write_text(text)
    (out / "gpu.json").write_text(json.dumps(_finite(data), indent=1, allow_nan=False) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results")
    parser.add_argument("--cache", type=Path, default=None)
    parser.add_argument("--no-tests", dest="tests", action="store_false")
    parser.add_argument("--no-model", dest="model", action="store_false")
    return parser.parse_args()


if __name__ == "__main__":
    main()
