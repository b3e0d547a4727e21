"""Quality of recipes at equal cost, against controls, on the trained models of the test bed.

    python benchmarks/leaderboard.py --model gpt2 --recipes "greedy on layers,random layers"

A recipe takes shares of the layers' cost (parameters, FLOPs or cache bytes a token) off a program,
in whole layers. Each runs under several seeds; a seed picks half of the calibration rows, and the
choice where it is random. Searches measure on these rows, figures come from the reporting rows.
Written as a table (terminal, Markdown), as JSON with the curves of a run's report, and as a plot,
anew after each seed. A new pass adds one line to recipes.py.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

import redpass
import testbed
from benchmarks.board import Board, Line, write
from benchmarks.recipes import RECIPES, Task
from redpass.analysis import structure
from redpass.budget.accounting import cost_record, usual_sizes
from redpass.data import Batches, Splits
from redpass.errors import UsageError, nearest
from redpass.facts import Facts
from redpass.passes.drop_branches import DropBranches
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
class Budget:
    """A cost, and which shares of that of all layers to save."""

    cost: str
    shares: tuple[float, ...]


@dataclass(frozen=True)
class Run:
    """One result: share of each cost that is left, figures, and the seconds it took to make."""

    costs: dict[str, float]
    estimates: dict[str, Estimate]
    seconds: float


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


def prepare(name: str, rows: int, batch: int, reporting: int) -> Bench:
    """Loads a model of the test bed, traces it and completes its data.

    Args:
        rows: of calibration data.
        reporting: rows that figures are reported on.
    """
    model = testbed.load(name)
    program = redpass.load(model.module, **_example(name, model))
    counts = {"calibration": rows, "choosing": batch, "reporting": reporting}
    parts = {
        split: batches(program, model.splits[split].part(slice(count)), batch)
        for split, count in counts.items()
    }
    Splits(**parts)  # refuses rows that are in two of them
    metrics = MODEL_METRICS.get(name, TEXT_METRICS)
    for metric in metrics:
        METRICS[metric].check(program, parts["reporting"])
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
        inputs = complete(program, part.inputs)
        if labels is None or labels.is_floating_point():
            return inputs
        return {**inputs, "labels": labels}

    return Batches(tuple(one(part) for part in split.batches(size)))


def run(bench: Bench, names: Sequence[str], budget: Budget, seeds: int) -> Iterator[list[Line]]:
    """Runs recipes under several seeds; after each seed yields a line for each recipe and share."""
    goals = targets(bench.program, budget)
    runs: dict[str, list[list[Run]]] = {name: [] for name in names}
    for seed in range(seeds):
        task = task_of(bench, budget, tuple(goals.values()), seed)
        for name in names:
            runs[name].append(one_run(bench, name, task))
            print(f"seed {seed}, {name}: {runs[name][-1][0].seconds:.1f} s a result", flush=True)
        yield [
            line_of(name, share, [found[place] for found in runs[name]])
            for place, share in enumerate(goals)
            for name in names
        ]


def layers_cost(program: Program, cost: str) -> tuple[float, int]:
    """Returns what all layers cost together, and how many layers there are."""
    facts = Facts(program)
    found = facts.get(structure)
    passed = DropBranches(only=tuple(branch.label for branch in found.branches))
    actions = passed.plan(program, facts).actions
    return sum(action.saving[cost] for action in actions), len(found.layers)


def targets(program: Program, budget: Budget) -> dict[float, float]:
    """Returns share -> the amount to save: that many whole layers, at least one, so that methods
    that drop layers and such that drop branches save the same.
    """
    whole, layers = layers_cost(program, budget.cost)
    return {s: whole * max(1, round(s * layers)) / layers for s in sorted(budget.shares)}


def task_of(bench: Bench, budget: Budget, goals: tuple[float, ...], seed: int) -> Task:
    """Returns what recipes are asked under one seed, which picks half of the calibration rows."""
    size = max(1, len(bench.calibration) // 2)
    picked = sorted(random.Random(seed).sample(range(len(bench.calibration)), size))
    data = Batches(tuple(bench.calibration[number] for number in picked))
    whole, _ = layers_cost(bench.program, budget.cost)
    return Task(bench.program, data, budget.cost, whole, goals, seed)


def one_run(bench: Bench, name: str, task: Task) -> list[Run]:
    """Returns what a recipe gives for each target of the task, on the reporting data."""
    started = time.perf_counter()
    programs = task.made(name)
    seconds = (time.perf_counter() - started) / len(programs)
    return [
        Run(remaining(bench.program, program), judged(bench, program), seconds)
        for program in programs
    ]


def judged(bench: Bench, program: Program) -> dict[str, Estimate]:
    """Measures a program on the reporting data."""
    metrics = [METRICS[metric] for metric in bench.metrics]
    return evaluate_all(metrics, program, bench.program, bench.reporting, originals=bench.originals)


def line_of(name: str, share: float, runs: Sequence[Run]) -> Line:
    """Returns mean and spread over seeds."""
    costs = {what: statistics.fmean(run.costs[what] for run in runs) for what in runs[0].costs}
    values, stderr = {}, {}
    for metric in runs[0].estimates:
        series = [run.estimates[metric] for run in runs]
        figures = [estimate.value for estimate in series]
        values[metric] = (statistics.fmean(figures), statistics.pstdev(figures))
        stderr[metric] = statistics.fmean(estimate.difference_stderr for estimate in series)
    seconds = statistics.fmean(run.seconds for run in runs)
    return Line(name, share, costs, values, stderr, seconds)


def remaining(before: Program, after: Program) -> dict[str, float]:
    """Returns the share of each cost that is left."""
    sizes = usual_sizes(before)
    old, new = cost_record(before, sizes), cost_record(after, sizes)
    known = [what for what in COSTS if getattr(old, what)]
    return {what: getattr(new, what) / getattr(old, what) for what in known}


def original_figures(bench: Bench) -> dict[str, float]:
    """Returns the original's own figures: the line to compare all others with."""
    return {name: estimate.value for name, estimate in judged(bench, bench.program).items()}


def data_words(bench: Bench, seeds: int) -> str:
    """Says on how many rows everything was measured."""
    rows = {
        what: sum(len(next(iter(batch.values()))) for batch in getattr(bench, what))
        for what in ("calibration", "reporting")
    }
    return (
        f"{rows['calibration']} calibration rows, of which each of {seeds} seeds picks half to "
        f"choose by and to fit on; figures from {rows['reporting']} reporting rows, mean over "
        "seeds ± their spread."
    )


def arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True, help=", ".join(testbed.names()))
    parser.add_argument("--recipes", default=",".join(RECIPES))
    parser.add_argument("--cost", default="parameters", choices=COSTS)
    parser.add_argument("--shares", default="0.1,0.2,0.3", help="shares of the cost to save")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=16, help="calibration rows")
    parser.add_argument("--reporting", type=int, default=32, help="reporting rows")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    return parser.parse_args()


def main() -> None:
    """Runs the recipes and writes the table and the plot."""
    options = arguments()
    names = options.recipes.split(",")
    for name in names:
        if name not in RECIPES:
            raise UsageError(f"unknown recipe '{name}'", hint=nearest(name, RECIPES))
    bench = prepare(options.model, options.rows, options.batch, options.reporting)
    shares = tuple(float(share) for share in options.shares.split(","))
    original = original_figures(bench)
    budget = Budget(options.cost, shares)
    for seed, lines in enumerate(run(bench, names, budget, options.seeds), 1):
        words = data_words(bench, seed)
        write(Board(bench.name, bench.metrics, options.cost, original, words, lines), options.out)


if __name__ == "__main__":
    main()
