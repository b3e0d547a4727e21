"""Quality of recipes at equal cost, against controls, on the trained models of the test bed.

    python benchmarks/leaderboard.py --model minilm --recipes similar,random,magnitude --seeds 3

A recipe takes a program down to a share of its cost (parameters, FLOPs or cache bytes a token).
Each is run at several shares and seeds; a seed picks the calibration rows, and the choice where
it is random. Facts come from the calibration split, figures from the reporting split. Written as a
table (terminal, Markdown), as JSON and as a plot. A new pass adds one line to recipes.py.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1]))

import redpass
import testbed
from benchmarks.recipes import CONTROLS, RECIPES, Budget
from redpass.budget.accounting import cost_record, usual_sizes
from redpass.data import Batches
from redpass.errors import UsageError, nearest
from redpass.facts import Facts
from redpass.program import Program
from redpass.verify.inputs import complete
from redpass.verify.metrics import METRICS, Estimate, Originals, evaluate_all

COSTS = ("parameters", "flops", "kv_bytes_per_token")
TEXT_METRICS = ("perplexity", "kl", "top1")
MODEL_METRICS: Mapping[str, tuple[str, ...]] = {
    "vit": ("accuracy", "kl", "top1"),
    "cnn": ("accuracy", "kl", "top1"),
    "minilm": ("cosine", "retrieval", "relative_error"),
    "dit": ("relative_error",),
}
"""What each model is judged by, the metric of the plot first; language models by `TEXT_METRICS`."""

SPECS: Mapping[str, tuple[str, ...]] = {
    "vit": ("pixel_values:float32[batch,1,24,24]",),
    "cnn": ("pixel_values:float32[batch,1,8,8]",),
    "minilm": ("input_ids:int64[batch,seq]", "attention_mask:int64[batch,seq]"),
    "dit": (
        "hidden_states:float32[batch,1,8,8]",
        "timestep:int64[batch]",
        "class_labels:int64[batch]",
    ),
}


@dataclass(frozen=True)
class Bench:
    """A model with the data it is judged on."""

    name: str
    program: Program
    calibration: Batches
    originals: Originals
    metrics: tuple[str, ...]

    @property
    def reporting(self) -> Batches:
        """The data figures are reported on."""
        return self.originals.batches


@dataclass(frozen=True)
class Line:
    """One recipe at one share: figures over seeds.

    Attributes:
        costs: share of each cost that is left, mean over seeds.
        values: metric -> (mean, standard deviation over seeds).
        stderr: metric -> error of one run from the spread over rows, mean over seeds.
    """

    recipe: str
    share: float
    costs: dict[str, float]
    values: dict[str, tuple[float, float]]
    stderr: dict[str, float]
    seconds: float


def prepare(name: str, rows: int, batch: int) -> Bench:
    """Loads a model of the test bed, traces it and completes its data."""
    model = testbed.load(name)
    program = redpass.load(model.module, **_example(name, model))
    parts = {
        split: batches(program, model.splits[split].part(slice(rows)), batch)
        for split in ("calibration", "reporting")
    }
    metrics = MODEL_METRICS.get(name, TEXT_METRICS)
    originals = Originals(program, parts["reporting"])
    return Bench(name, program, parts["calibration"], originals, metrics)


def _example(name: str, model: testbed.TestbedModel) -> dict[str, Any]:
    """What `load` needs to be told; the language models' configs say enough themselves."""
    if name not in SPECS:
        return {}
    inputs = model.splits["calibration"].part(slice(2)).inputs
    return {"example": dict(inputs), "inputs": SPECS[name]}


def batches(program: Program, split: testbed.Split, size: int) -> Batches:
    """Returns a split as batches that hold every input of the program, and labels."""

    def one(part: testbed.Split) -> dict[str, torch.Tensor]:
        labels = part.targets
        classes = labels is not None and not labels.is_floating_point()
        extra = {"labels": labels} if classes else {}
        return complete(program, part.inputs) | extra

    return Batches(tuple(one(part) for part in split.batches(size)))


def run(
    bench: Bench, names: Sequence[str], budgets: Sequence[Budget], seeds: int
) -> Iterator[Line]:
    """Yields a line for each recipe and share."""
    for budget in budgets:
        for name in names:
            yield measure(bench, name, budget, seeds)


def measure(bench: Bench, name: str, budget: Budget, seeds: int) -> Line:
    """Runs one recipe at one share under several seeds."""
    started = time.perf_counter()
    found = [one_run(bench, name, budget, seed) for seed in range(seeds)]
    costs = {what: statistics.fmean(left[what] for left, _ in found) for what in found[0][0]}
    values, stderr = {}, {}
    for metric in bench.metrics:
        series = [estimates[metric] for _, estimates in found]
        figures = [estimate.value for estimate in series]
        values[metric] = (statistics.fmean(figures), statistics.pstdev(figures))
        stderr[metric] = statistics.fmean(estimate.difference_stderr for estimate in series)
    seconds = (time.perf_counter() - started) / seeds
    return Line(name, budget[1], costs, values, stderr, seconds)


def one_run(
    bench: Bench, name: str, budget: Budget, seed: int
) -> tuple[dict[str, float], dict[str, Estimate]]:
    """Returns what is left of each cost, and the metrics on the reporting data."""
    chosen = random.Random(seed).sample(range(len(bench.calibration)), half(bench.calibration))
    calibration = Batches(tuple(bench.calibration[number] for number in chosen))
    result = RECIPES[name](bench.program, Facts(bench.program, calibration), budget, seed)
    metrics = [METRICS[metric] for metric in bench.metrics]
    estimates = evaluate_all(
        metrics, result, bench.program, bench.reporting, originals=bench.originals
    )
    return remaining(bench.program, result), estimates


def half(data: Batches) -> int:
    """Half of the batches, at least one: what one seed sees of the calibration data."""
    return max(1, len(data) // 2)


def remaining(before: Program, after: Program) -> dict[str, float]:
    """Returns the share of each cost that is left."""
    sizes = usual_sizes(before)
    old, new = cost_record(before, sizes), cost_record(after, sizes)
    known = [what for what in COSTS if getattr(old, what)]
    return {what: getattr(new, what) / getattr(old, what) for what in known}


def original_figures(bench: Bench) -> dict[str, float]:
    """Returns the original's own figures: the line to compare all others with."""
    metrics = [METRICS[metric] for metric in bench.metrics]
    found = evaluate_all(
        metrics, bench.program, bench.program, bench.reporting, originals=bench.originals
    )
    return {name: estimate.value for name, estimate in found.items()}


def cells(line: Line, metrics: Sequence[str]) -> list[str]:
    """Returns a line's cells: recipe, what is left, figures with their spread over seeds."""
    left = [f"{100 * share:.1f}" for share in line.costs.values()]
    figures = [f"{mean:.4g} ± {spread:.2g}" for mean, spread in map(line.values.get, metrics)]
    return [line.recipe, *left, *figures, f"{line.seconds:.1f}"]


def header(bench: Bench, lines: Sequence[Line]) -> list[str]:
    """Returns the columns' titles."""
    left = [f"{what} %" for what in lines[0].costs]
    figures = [f"{name} ({METRICS[name].better} is better)" for name in bench.metrics]
    return ["recipe", *left, *figures, "s a run"]


def rows_of(bench: Bench, original: Mapping[str, float], lines: Sequence[Line]) -> list[list[str]]:
    """Returns all rows, the original first."""
    whole = ["100.0" for _ in lines[0].costs]
    first = ["original", *whole, *(f"{original[name]:.4g}" for name in bench.metrics), ""]
    return [first, *(cells(line, bench.metrics) for line in lines)]


def markdown(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns a table in Markdown."""
    body = [titles, ["---"] * len(titles), *rows]
    return "\n".join("| " + " | ".join(row) + " |" for row in body) + "\n"


def show(bench: Bench, titles: Sequence[str], rows: Sequence[Sequence[str]], what: str) -> None:
    """Prints the table."""
    table = Table(*titles, title=f"{bench.name}: quality at equal {what}")
    for row in rows:
        table.add_row(*row)
    Console().print(table)


def plot(
    bench: Bench, original: Mapping[str, float], lines: Sequence[Line], what: str, path: Path
) -> None:
    """Draws the first metric over what is left of the cost, one curve a recipe."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    metric = bench.metrics[0]
    figure, axes = pyplot.subplots(figsize=(6, 4))
    for name in dict.fromkeys(line.recipe for line in lines):
        own = [line for line in lines if line.recipe == name]
        left = [100.0] + [100 * line.costs[what] for line in own]
        means = [original[metric]] + [line.values[metric][0] for line in own]
        spread = [0.0] + [line.values[metric][1] for line in own]
        style = "--" if name in CONTROLS else "-"
        axes.errorbar(left, means, spread, label=name, linestyle=style, marker="o", capsize=3)
    axes.set(xlabel=f"{what} left, %", ylabel=metric, title=bench.name)
    axes.invert_xaxis()
    axes.set_yscale("log" if metric == "perplexity" else "linear")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def write(bench: Bench, lines: Sequence[Line], what: str, folder: Path) -> None:
    """Prints the table and writes `leaderboard-MODEL.{md,json,png}`."""
    original = original_figures(bench)
    titles, rows = header(bench, lines), rows_of(bench, original, lines)
    show(bench, titles, rows, what)
    folder.mkdir(parents=True, exist_ok=True)
    stem = folder / f"leaderboard-{bench.name}"
    stem.with_suffix(".md").write_text(markdown(titles, rows))
    record = {"original": original, "cost": what, "lines": [asdict(line) for line in lines]}
    stem.with_suffix(".json").write_text(json.dumps(record, indent=1))
    plot(bench, original, lines, what, stem.with_suffix(".png"))


def arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True, help=", ".join(testbed.names()))
    parser.add_argument("--recipes", default=",".join(RECIPES))
    parser.add_argument("--cost", default="parameters", choices=COSTS)
    parser.add_argument("--shares", default="0.1,0.2,0.3", help="shares of the cost to save")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=32, help="rows of each split")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    return parser.parse_args()


def main() -> None:
    """Runs the recipes and writes the table and the plot."""
    options = arguments()
    names = options.recipes.split(",")
    for name in names:
        if name not in RECIPES:
            raise UsageError(f"unknown recipe '{name}'", hint=nearest(name, RECIPES))
    bench = prepare(options.model, options.rows, options.batch)
    budgets = [(options.cost, float(share)) for share in options.shares.split(",")]
    lines = []
    for line in run(bench, names, budgets, options.seeds):
        print(f"{line.recipe} at {line.share:.0%} saved: {line.seconds:.1f} s a run", flush=True)
        lines.append(line)
    write(bench, lines, options.cost, options.out)


if __name__ == "__main__":
    main()
