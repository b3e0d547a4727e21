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
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))

from gpu_cases import Case, Maker, Rates, cases, floor, percent

from redpass.codegen import tuning
from redpass.codegen.folder import versions
from redpass.codegen.ops import register
from redpass.codegen.tune import Timer, device_timer, tune

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
    rewritten = timer(case.rival)
    compiled = torch.compile(case.op.reference, dynamic=False)
    rivals = {
        "eager PyTorch": lambda: case.op.reference(*case.arguments),
        "torch.compile": lambda: compiled(*case.arguments),
    }
    least = floor(case, rates)
    compiled_time, note = _attempt(lambda: timer(rivals["torch.compile"]))
    if refusal := case.op.refuses(*case.arguments):
        return Row(case.op.name, case.label, math.nan, rewritten, case.rival_name, compiled_time,
                   least, f"refused: {refusal}")  # fmt: skip
    known = (
        dict(rivals) if math.isfinite(compiled_time) else {"eager PyTorch": rivals["eager PyTorch"]}
    )
    timing = tune(case.op, case.arguments, timer, known)
    if timing is None:
        return Row(case.op.name, case.label, math.nan, rewritten, case.rival_name, compiled_time,
                   least, "no configuration works")  # fmt: skip
    timings.append(timing)
    return Row(case.op.name, case.label, timing.micros, rewritten, case.rival_name, compiled_time,
               least, note)  # fmt: skip


def _attempt(call: Callable[[], float]) -> tuple[float, str]:
    try:
        return call(), ""
    except Exception as error:
        return math.nan, f"torch.compile: {type(error).__name__}"


def markdown(rows: Iterable[Row], rates: Rates, about: Mapping[str, str], tail: str = "") -> str:
    """Returns the table with what it was measured on."""
    lines = ["# Kernels on a GPU", "", "Made by `python benchmarks/gpu.py`.", ""]
    lines += [f"- {key}: {value}" for key, value in about.items()]
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


def about_device() -> dict[str, str]:
    """Returns the card, its driver and the versions that the figures depend on."""
    device = tuning.this_device()
    assert device is not None
    return {
        "GPU": device.name,
        "driver": device.driver,
        "CUDA": str(torch.version.cuda),
    } | versions()


def model_rows(timer: Timer) -> list[tuple[str, float, float]]:
    """Times a Llama of 8B with random weights: (sizes, as traced, lowered), in microseconds."""
    import transformers

    import redpass
    from redpass.lowering import lower, on_device
    from redpass.verify.inputs import random_inputs

    os.environ["REDPASS_CHECK"] = "rules"  # float64 runs of 8B on the CPU take hours
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, vocab_size=128256, max_position_embeddings=131072,
        rope_theta=500000.0, dtype=torch.bfloat16,
    )  # fmt: skip
    with torch.device("cpu"):
        module = transformers.LlamaForCausalLM(config).to(torch.bfloat16).eval()
    program = redpass.optimize(redpass.load(module)).program
    found = []
    both = [on_device(p, "cuda") for p in (program, lower(program, "triton").program)]
    for sizes in MODEL_SIZES:
        values = {k: v.cuda() for k, v in random_inputs(program, sizes).items()}
        times = [timer(functools.partial(p, **values)) for p in both]
        found.append((", ".join(f"{k} {v}" for k, v in sizes.items()), *times))
    return found


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
    register()
    if options.tests:
        command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests/codegen"]
        subprocess.run(command, cwd=ROOT, check=True)
    maker, timings = Maker(), list[tuning.Timing]()
    rates = measure_rates(device_timer, maker)
    rows = []
    for case in cases(maker):
        rows.append(measure(case, device_timer, rates, timings))
        print(" | ".join(rows[-1].cells), flush=True)
        torch.cuda.empty_cache()
    tuning.write(tuning.cache_folder(options.cache), device, timings)
    ends = model_rows(device_timer) if options.model else []
    options.out.mkdir(parents=True, exist_ok=True)
    text = markdown(rows, rates, about_device(), model_table(ends) if ends else "")
    (options.out / "gpu.md").write_text(text)
    data: dict[str, Any] = {
        "about": about_device(),
        "rates": asdict(rates),
        "rows": [asdict(row) for row in rows],
        "model": ends,
        "timings": [asdict(timing) for timing in timings],
    }
    (options.out / "gpu.json").write_text(json.dumps(data, indent=1) + "\n")
    print(text)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results")
    parser.add_argument("--cache", type=Path, default=None)
    parser.add_argument("--no-tests", dest="tests", action="store_false")
    parser.add_argument("--no-model", dest="model", action="store_false")
    return parser.parse_args()


if __name__ == "__main__":
    main()
