"""Low rank on the trained models of the test bed: what whitening and allocated ranks are worth.

    python benchmarks/width_rank.py --model gpt2 --part ranks --seeds 0,1,2
    python benchmarks/width_rank.py --model gpt2 --part heads --seeds 0,1,2

Part `ranks` takes 20, 40 and 60% off the parameters of the branches' projections by low rank. Part
`heads` takes 25, 50 and 75% off the width of value heads, in all layers alike. All rows of one
column save the same, up to rounding in favour of the control. A seed picks half of the calibration
rows; figures are from reporting rows. Results are kept in `results/width_rank.json` after each
seed, and the tables written anew from all that is there.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.leaderboard import Bench, judged, prepare
from redpass import rewrite
from redpass.analysis.ranks.sites import sites
from redpass.analysis.structure import structure
from redpass.budget.allocation import allocated, ladders, measure_ladders
from redpass.budget.candidates import Candidate
from redpass.data import Batches
from redpass.facts import Facts
from redpass.passes.factor_linears import FactorLinears
from redpass.passes.shrink_heads import ShrinkHeads
from redpass.plan import Action, Pass
from redpass.verify.metrics import METRICS, evaluate_all
from redpass.verify.originals import Originals

LADDER = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.25, 0.12)
PARTS = {"ranks": (0.2, 0.4, 0.6), "heads": (0.25, 0.5, 0.75)}
"""Shares that are cut."""

TRIAL_BATCHES = 1
"""Calibration batches on which one rung of each ladder is tried."""

Choice = dict[str, Action]
"""Place -> the rung that is taken."""


@dataclass(frozen=True)
class Task:
    """One seed of one model."""

    bench: Bench
    facts: Facts
    seed: int
    has_trials: bool = True

    def rungs(self, pass_: Pass) -> list[Action]:
        """Returns the candidates inside of branches."""
        inside = {name for b in self.facts.get(structure).branches for name in b.path}
        own = {
            f"{label}/rank"
            for label, site in self.facts.get(sites).found.items()
            if all(linear.node in inside for linear in site.linears)
        }
        actions = pass_.plan(self.bench.program, self.facts).actions
        return [a for a in actions if not a.place.endswith("/rank") or a.place in own]

    def result(self, choice: Choice) -> dict[str, float]:
        """Returns the figures of a choice, and the parameters it saves."""
        program = rewrite.apply(self.bench.program, list(choice.values()))
        found = {name: value.value for name, value in judged(self.bench, program).items()}
        return found | {"saved": sum(a.saving["parameters"] for a in choice.values())}

    def scales(self, rungs: Sequence[Action], pass_: Pass) -> dict[str, float]:
        """Returns what each ladder's predicted loss is multiplied by: one trial each."""
        data = Batches(self.facts.data().items[:TRIAL_BATCHES])
        originals = Originals(self.bench.program, data)
        name = "kl" if "kl" in self.bench.metrics else "relative_error"

        def attempt(candidate: Candidate) -> bool:
            program = rewrite.apply(self.bench.program, [candidate.action])
            found = evaluate_all(
                [METRICS[name]], program, self.bench.program, data, originals=originals
            )
            candidate.loss = found[name].value ** (1 if name == "kl" else 2)
            return True

        return measure_ladders([Candidate(pass_, action) for action in rungs], attempt)


def uniform(rungs: Sequence[Action], left: float) -> Choice:
    """Takes the widest rung of each place that leaves at most a share."""
    found: Choice = {}
    for action in sorted(rungs, key=lambda a: -a.evidence["left"]):
        if action.evidence["left"] <= left + 1e-9:
            found.setdefault(action.place, action)
    return found


def climbed(order: Sequence[Action], goal: float) -> Choice:
    """Takes rungs in order until they save as much as the goal; then leaves out what is spare."""
    found: Choice = {}
    for action in order:
        before = found.get(action.place)
        if before is None or action.saving["parameters"] > before.saving["parameters"]:
            found[action.place] = action
        if sum(a.saving["parameters"] for a in found.values()) >= goal:
            break
    return found


def at_random(rungs: Sequence[Action], seed: int) -> list[Action]:
    """Returns the rungs of all ladders in random order, each ladder from its top."""
    chance = random.Random(seed)
    pool = {
        place: sorted((c.action for c in found), key=lambda a: a.saving["parameters"])
        for place, found in ladders([Candidate(FactorLinears(), a) for a in rungs]).items()
    }
    order = []
    while pool:
        place = chance.choice(sorted(pool))
        order.append(pool[place].pop(0))
        if not pool[place]:
            del pool[place]
    return order


def ranks(task: Task, cuts: Sequence[float]) -> dict[str, dict[str, dict[str, float]]]:
    """Returns cut -> method -> figures, for low rank."""
    options: dict[str, Any] = {"shares": LADDER, "multiple": 8}
    plain = task.rungs(FactorLinears(whiten=False, **options))
    stream_pass, fisher_pass = FactorLinears(**options), FactorLinears(score="fisher", **options)
    stream, fisher = task.rungs(stream_pass), task.rungs(fisher_pass)
    orders = {
        "whitened, random ranks": at_random(stream, task.seed),
        "whitened, predicted": in_order(stream, stream_pass),
        "whitened, Fisher": in_order(fisher, fisher_pass),
    }
    if task.has_trials:
        scales = task.scales(stream, stream_pass)
        orders["whitened, measured"] = in_order(stream, stream_pass, scales)
    found = {}
    for cut in cuts:
        control = uniform(stream, 1 - cut)
        goal = sum(a.saving["parameters"] for a in control.values())
        choices = {
            "plain SVD, uniform ranks": uniform(plain, 1 - cut),
            "whitened, uniform ranks": control,
            **{name: climbed(order, goal) for name, order in orders.items()},
        }
        found[str(cut)] = {name: task.result(choice) for name, choice in choices.items()}
    return found


def heads(task: Task, cuts: Sequence[float]) -> dict[str, dict[str, dict[str, float]]]:
    """Returns cut -> method -> figures, for value heads of one width in all layers."""
    methods: dict[str, dict[str, Any]] = {
        "magnitude, no refit": {"basis": "magnitude", "refit": False},
        "magnitude": {"basis": "magnitude"},
        "CLOVER, no refit": {"basis": "weights", "refit": False},
        "CLOVER": {"basis": "weights"},
        "activations, no refit": {"refit": False},
        "activations": {},
    }
    found: dict[str, dict[str, dict[str, float]]] = {str(cut): {} for cut in cuts}
    for name, options in methods.items():
        pass_ = ShrinkHeads(shares=tuple(1 - cut for cut in cuts), multiple=1, **options)
        rungs = [action for action in task.rungs(pass_) if ".values@" in action.target]
        for cut in cuts:
            found[str(cut)][name] = task.result(uniform(rungs, 1 - cut))
    return found


def in_order(
    rungs: Sequence[Action], pass_: Pass, scales: dict[str, float] | None = None
) -> list[Action]:
    """Returns the rungs as water-filling climbs them."""
    pool = [Candidate(pass_, action) for action in rungs]
    order = allocated(pool, lambda action: action.saving["parameters"], scales)
    return [candidate.action for candidate in order]


Part = Callable[[Task, Sequence[float]], dict[str, dict[str, dict[str, float]]]]
RUNS: dict[str, Part] = {"ranks": ranks, "heads": heads}


def seeded(bench: Bench, seed: int, has_trials: bool) -> Task:
    """Returns the task of a seed, which picks half of the calibration rows."""
    size = max(1, len(bench.calibration) // 2)
    picked = sorted(random.Random(seed).sample(range(len(bench.calibration)), size))
    data = Batches(tuple(bench.calibration[number] for number in picked))
    return Task(bench, Facts(bench.program, data), seed, has_trials)


def tables(kept: dict[str, Any]) -> str:
    """Returns all tables: mean over seeds ± spread, and the ratio to the part's control."""
    lines = ["# Low rank: whitening, allocation, head widths", ""]
    lines += ["`python benchmarks/width_rank.py --model ... --part ...`; see its docstring.", ""]
    lines += ["Mean over seeds ± their spread; `saved`, in the JSON, is parameters.", ""]
    for name, runs in sorted(kept.items()):
        lines += _table(name, runs)
    return "\n".join(lines)


def _table(name: str, runs: dict[str, Any]) -> list[str]:
    seeds = [run for seed, run in sorted(runs.items()) if seed != "original"]
    original = runs["original"]
    first = next(iter(original))
    shown = [metric for metric in dict.fromkeys((first, "kl")) if metric in original]
    cuts = list(seeds[0])
    lines = [f"## {name}, {len(seeds)} seeds, original {first} {original[first]:.4g}", ""]
    heads = [f"{metric}, {float(cut):.0%} cut" for cut in cuts for metric in shown]
    lines += ["| | " + " | ".join(heads) + " |", "|---|" + "---|" * len(heads)]
    for method in seeds[0][cuts[0]]:
        cells = []
        for cut in cuts:
            for metric in shown:
                values = [run[cut][method][metric] for run in seeds]
                cells.append(f"{statistics.fmean(values):.4g} ± {statistics.pstdev(values):.1g}")
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return [*lines, ""]


def main() -> None:
    """Runs seeds of one part on one model and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--part", choices=list(RUNS), default="ranks")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--rows", type=int, default=16, help="calibration rows")
    parser.add_argument("--reporting", type=int, default=8, help="reporting rows")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--no-trials", action="store_true", help="leave measured allocation out")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    bench = prepare(options.model, options.rows, options.batch, options.reporting)
    original = {name: value.value for name, value in judged(bench, bench.program).items()}
    store = options.out / "width_rank.json"
    for seed in map(int, options.seeds.split(",")):
        started = time.perf_counter()
        found = RUNS[options.part](seeded(bench, seed, not options.no_trials), PARTS[options.part])
        kept = json.loads(store.read_text()) if store.exists() else {}
        runs = kept.setdefault(f"{options.model}, {options.part}", {"original": original})
        runs[str(seed)] = found
        store.write_text(json.dumps(kept, indent=1) + "\n")
        (options.out / "width_rank.md").write_text(tables(kept))
        print(f"seed {seed}: {time.perf_counter() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
