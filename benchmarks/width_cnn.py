"""Channels of a convolutional network: redpass against torch-pruning at equal FLOPs.

    pip install torch-pruning --no-deps        # for this script only
    python benchmarks/width_cnn.py

Both prune the residual CNN of the test bed, without any training after it. redpass cuts to about
a share of the FLOPs. torch-pruning (Fang et al. 2023, arXiv:2301.12900) prunes in small steps and
is judged at its last step that still costs at least what redpass' result costs; each of its
importances (magnitude, LAMP, Taylor with gradients on the same calibration rows; ranked over the
whole network or within each layer) is a competitor. Accuracy is from the reporting rows. Written
to results/width_cnn.{md,json}.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parents[1]))

import redpass
import testbed
from benchmarks.leaderboard import SPECS, Bench, judged, prepare
from redpass.analysis.cost import total_cost
from redpass.budget import choose
from redpass.data import Batches
from redpass.program import Program

SHARES = (0.75, 0.5, 0.35)
STEPS = 60
"""Steps in which torch-pruning goes from nothing to all."""
SIZES = {"batch": 1}
LADDER = "shares=(0.875, 0.75, 0.625, 0.5, 0.375, 0.25), multiple=2"
REPAIRED = "redpass, repaired"
OURS = {
    REPAIRED: f"prune_channels({LADDER})",
    "redpass, unrepaired": f"prune_channels({LADDER}, refit=False)",
}
RESULTS = Path(__file__).parent / "results"


def competitors(pruning: Any) -> Iterator[tuple[str, Any, bool, bool]]:
    """Yields name, importance, whether it is ranked globally and whether it needs gradients."""
    for name, importance, needs in (
        ("magnitude", pruning.importance.GroupMagnitudeImportance(), False),
        ("LAMP", pruning.importance.LAMPImportance(), False),
        ("Taylor", pruning.importance.GroupTaylorImportance(), True),
    ):
        for is_global in (True, False):
            where = "global" if is_global else "per layer"
            yield f"torch-pruning, {name}, {where}", importance, is_global, needs


def pruned(
    pruning: Any,
    importance: Any,
    is_global: bool,
    needs_gradients: bool,
    data: Batches,
    limits: Sequence[int],
) -> dict[int, nn.Module]:
    """Returns number of FLOPs -> the network pruned until one step more would cost less."""
    module = copy.deepcopy(testbed.load("cnn").module)
    for parameter in module.parameters():
        parameter.requires_grad_(True)
    example = data[0]["pixel_values"][:2]
    pruner = pruning.pruner.BasePruner(
        module, example, importance=importance, pruning_ratio=0.98, iterative_steps=STEPS,
        global_pruning=is_global, ignored_layers=[module.head], max_pruning_ratio=1.0,
    )  # fmt: skip
    found = dict[int, nn.Module]()
    before = copy.deepcopy(module)
    for _ in range(STEPS):
        if needs_gradients:
            _gradients(module, data)
        pruner.step()
        now = _count(module)
        for limit in limits:
            if now < limit and limit not in found:
                found[limit] = before.eval().requires_grad_(False)
        if len(found) == len(set(limits)):
            break
        module.zero_grad()
        before = copy.deepcopy(module)
    return found


def _count(module: nn.Module) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(torch.zeros(1, 1, 8, 8))
    return int(counter.get_total_flops())


def _gradients(module: nn.Module, data: Batches) -> None:
    module.zero_grad()
    for batch in data:
        loss = nn.functional.cross_entropy(module(batch["pixel_values"]), batch["labels"])
        loss.backward()


def traced(module: nn.Module) -> Program:
    """Returns the network as a program of its own."""
    example = {"pixel_values": torch.zeros(2, 1, 8, 8)}
    frozen = copy.deepcopy(module).eval().requires_grad_(False)
    return redpass.load(frozen, example=example, inputs=SPECS["cnn"])


def flops(program: Program) -> int:
    """FLOPs of one image."""
    return total_cost(program).flops(SIZES)


def compare(bench: Bench, pruning: Any) -> Iterator[dict[str, Any]]:
    """Yields a record for each result of redpass, then for each competitor at its FLOPs."""
    whole = flops(bench.program)
    assert whole == _count(testbed.load("cnn").module), "the two counters differ"
    limits: dict[int, tuple[str, float]] = {}
    for share in SHARES:
        for name, spec in OURS.items():
            made = choose(
                bench.program, spec, share=1 - share, data=bench.calibration,
                cost="flops", of="program", search="allocated", metric="kl",
            ).program  # fmt: skip
            yield record(bench, name, share, made, whole)
            if name == REPAIRED:
                limits[flops(made)] = (name, share)
    for name, importance, is_global, gradients in competitors(pruning):
        made_by = pruned(pruning, importance, is_global, gradients, bench.calibration, list(limits))
        for limit, module in made_by.items():
            program = traced(module)
            assert flops(program) >= limit
            yield record(bench, name, limits[limit][1], program, whole)


def record(
    bench: Bench, name: str, share: float, program: Program, whole: int
) -> dict[str, object]:
    """Returns what a program costs and how good it is."""
    found = judged(bench, program)
    result = {
        "method": name, "share": share, "flops": flops(program) / whole,
        "parameters": total_cost(program).parameters,
        "accuracy": found["accuracy"].value, "kl": found["kl"].value,
    }  # fmt: skip
    print({k: round(v, 4) if isinstance(v, float) else v for k, v in result.items()}, flush=True)
    return result


def lines(records: Sequence[dict[str, Any]], original: float) -> Iterator[str]:
    """Yields the table and the verdicts."""
    yield "| share asked for | method | FLOPs left | parameters | accuracy | kl |"
    yield "|---|---|---|---|---|---|"
    yield f"| | original | 100.0% | | {original:.4f} | 0 |"
    verdicts = []
    for share in SHARES:
        here = [r for r in records if r["share"] == share]
        for r in here:
            yield (
                f"| {share:.0%} | {r['method']} | {r['flops']:.1%} | {r['parameters']} "
                f"| {r['accuracy']:.4f} | {r['kl']:.3f} |"
            )
        ours = next(r["accuracy"] for r in here if r["method"] == REPAIRED)
        best = max((r for r in here if r["method"] not in OURS), key=lambda r: r["accuracy"])
        state = "met" if ours >= best["accuracy"] else "missed"
        verdicts.append(
            f"{share:.0%}: redpass {ours:.4f}, best of torch-pruning {best['accuracy']:.4f} "
            f"({best['method']}): {state}"
        )
    yield ""
    yield from (f"- {verdict}" for verdict in verdicts)


def main() -> None:
    """Compares, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--batch", type=int, default=50)
    options = parser.parse_args()
    try:
        import torch_pruning
    except ImportError:
        sys.exit("this script compares with torch-pruning: pip install torch-pruning --no-deps")
    bench = prepare("cnn", 150, options.batch, 400)
    original = judged(bench, bench.program)["accuracy"].value
    records = list(compare(bench, torch_pruning))
    text = "\n".join(
        ["# Channels of a CNN, without fine-tuning", "",
         f"The residual CNN of the test bed, {len(bench.calibration) * options.batch} calibration "
         f"rows, 400 reporting rows; torch-pruning {torch_pruning.__version__}.", "",
         *lines(records, original), ""]
    )  # fmt: skip
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "width_cnn.md").write_text(text)
    (RESULTS / "width_cnn.json").write_text(json.dumps(records, indent=1))
    print(text)


if __name__ == "__main__":
    main()
