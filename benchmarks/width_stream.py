"""Quality and time after the residual stream was made narrower.

    python benchmarks/width_stream.py --models gpt2,qwen3,vit --seeds 0,1,2

Compared at 90, 80 and 70% of the width: principal directions with and without a fit of what reads,
with the tied table cut once or left whole; controls at equal width: random directions and the
channels of largest energy, both with the fit. A seed picks half of the calibration rows (and the
random directions); figures are from the reporting rows. Time: processor seconds of the eager
program over the original's, in turns, median of the rounds. Written after each seed to
results/width_stream.{md,json}, beside what is there already.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.leaderboard import Bench, remaining
from benchmarks.studies import Record, run
from redpass import rewrite
from redpass.analysis.rotations.bases import Basis, basis
from redpass.analysis.rotations.ladders import Cutter, Rung, counts
from redpass.analysis.rotations.sites import streams
from redpass.data import Batches
from redpass.facts import Facts
from redpass.plan import Action
from redpass.program import Program
from redpass.verify.inputs import complete
from redpass.verify.metrics import METRICS, evaluate_all

SHARES = (0.9, 0.8, 0.7)
METHODS = {
    "principal, fitted": ("principal", True, "mixed"),
    "principal, bare": ("principal", False, "mixed"),
    "principal, fitted, table whole": ("principal", True, "whole"),
    "channels, fitted": ("channels", True, "mixed"),
    "random, fitted": ("random", True, "mixed"),
}
"""Method -> directions, whether readers are fitted anew, what becomes of the tied table."""
MAIN = "principal, fitted"
MODEL_METRICS = {"vit": ("cosine", "kl", "accuracy")}
TEXT_METRICS = ("perplexity", "kl", "top1")
MULTIPLES = {"vit": 1}
"""What widths are a multiple of; at a width of 64 multiples of 8 do not tell 80 from 70%."""


def cuts(bench: Bench, data: Batches, seed: int) -> Iterator[tuple[str, Rung, Program]]:
    """Yields method, rung and program, from one calibration run for each treatment of the table."""
    facts = Facts(bench.program, data)
    [stream] = facts.get(streams)
    widths = counts(stream, SHARES, MULTIPLES.get(bench.name, 8))
    cutters = {tied: Cutter(facts, stream, data, tied=tied) for tied in ("mixed", "whole")}
    for method, (kind, refit, tied) in METHODS.items():
        if tied == "whole" and not stream.ties:
            continue
        cutter = cutters[tied]
        bases = _random(cutter, widths, seed) if kind == "random" else cutter.bases(widths, kind)
        for rung in cutter.rungs(bases, refit=refit):
            cut = Action("cut", f"stream@{rung.width}", rung.edits, "")
            yield method, rung, rewrite.apply(bench.program, [cut])


def _random(cutter: Cutter, widths: Sequence[int], seed: int) -> list[Basis]:
    """Nested random directions, at right angles to the mean where a layer norm takes it off."""
    stream = cutter.stream
    drawn = torch.randn(
        stream.width, stream.width, generator=torch.Generator().manual_seed(seed)
    ).double()
    if stream.has_mean:
        drawn = drawn - drawn.mean(0)
    turned = torch.linalg.qr(drawn[:, : max(widths)])[0]
    mean = stream.has_mean
    return [basis(turned[:, : width - mean], has_mean=mean) for width in widths]


def measure(bench: Bench, seed: int, data: Batches) -> Iterator[Record]:
    """Yields one record for each method and share."""
    metrics = metrics_of(bench.name)
    for number, (method, rung, program) in enumerate(cuts(bench, data, seed)):
        now = evaluate_all(
            [METRICS[m] for m in metrics], program, bench.program, bench.reporting,
            originals=bench.originals,
        )  # fmt: skip
        record: Record = {
            "method": method, "share": SHARES[number % len(SHARES)], "width": rung.width,
            "predicted": rung.error, "original": now[metrics[0]].original,
            **{metric: estimate.value for metric, estimate in now.items()},
            **{f"{what} left": left for what, left in remaining(bench.program, program).items()},
        }  # fmt: skip
        if method == MAIN and seed == 0:
            record["time"] = time_ratio(bench, program)
        yield record


def metrics_of(model: str) -> tuple[str, ...]:
    return MODEL_METRICS.get(model, TEXT_METRICS)


def time_ratio(bench: Bench, program: Program, rounds: int = 15) -> float:
    """Returns processor time of `program` over the original's on one batch, in turns, median."""
    inputs = complete(bench.program, bench.reporting[0])
    named = {port.name: inputs[port.name] for port in bench.program.signature.inputs}

    def seconds(which: Program) -> float:
        started = time.process_time()
        which(**named)
        return time.process_time() - started

    seconds(bench.program), seconds(program)
    return statistics.median(seconds(program) / seconds(bench.program) for _ in range(rounds))


def table(found: Sequence[Mapping[str, object]]) -> Iterator[str]:
    """Yields the lines of the Markdown tables."""
    for model in dict.fromkeys(str(record["model"]) for record in found):
        metrics = metrics_of(model)
        mine = [record for record in found if record["model"] == model]
        seeds = len({record["seed"] for record in mine})
        yield f"## {model}: {metrics[0]} of the original {mine[0]['original']:.4g}, {seeds} seeds"
        yield ""
        yield f"| width | method | {' | '.join(metrics)} | parameters | FLOPs | time | predicted |"
        yield "|---" * (len(metrics) + 6) + "|"
        for share in SHARES:
            for method in METHODS:
                records = [r for r in mine if (r["share"], r["method"]) == (share, method)]
                if records:
                    yield _line(share, method, records, metrics)
        yield ""


def _line(
    share: float,
    method: str,
    records: Sequence[Mapping[str, object]],
    metrics: Sequence[str],
) -> str:
    def mean(key: str) -> float:
        return statistics.fmean(float(str(record[key])) for record in records)

    spread = statistics.pstdev([float(str(record[metrics[0]])) for record in records])
    values = [f"{mean(metric):.4g}" for metric in metrics]
    values[0] += f" ± {spread:.2g}"
    times = [float(str(record["time"])) for record in records if "time" in record]
    shares = [f"{100 * mean(f'{what} left'):.0f}%" for what in ("parameters", "flops")]
    last = f"{times[0]:.2f}" if times else ""
    return (
        f"| {share:.0%} | {method} | {' | '.join([*values, *shares])} | {last} "
        f"| {mean('predicted'):.4f} |"
    )


def page(found: Sequence[Mapping[str, object]]) -> Iterator[str]:
    """Yields the lines of the page."""
    yield "# Stream width: principal directions against controls"
    yield ""
    yield (
        "Each seed fits on half of the calibration rows; figures on reporting rows. What is left "
        "of parameters and FLOPs in percent; time is processor time over the original's, eager, "
        "one batch. Predicted: the share of the normed stream that readers miss."
    )
    yield ""
    yield from table(found)


if __name__ == "__main__":
    run(__doc__, "width_stream", "gpt2,qwen3,vit", measure, page)
