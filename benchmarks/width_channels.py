"""Quality after a quarter and a half of all feed-forward channels were cut.

    python benchmarks/width_channels.py --models gpt2,qwen3 --seeds 0,1,2

All feed-forwards of a model are cut to the same share. Compared: which channels go (by what losing
them costs after a repair, by energy, by magnitude, by chance), whether the down-projection is
fitted anew, and whether `refit_projections` then fits what writes to the stream. A seed picks half
of the calibration rows; figures are from the reporting rows. The goal: the repaired loss increase
is at most 0.6 of the unrepaired one's, each with its own best choice. Written after each seed to
results/width_channels.{md,json}, beside what is there already.
"""

from __future__ import annotations

import math
import statistics
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.leaderboard import Bench, judged
from benchmarks.studies import Record, run
from redpass import rewrite
from redpass.analysis.structure import structure
from redpass.analysis.widths.cuts import energy_scores, removal_order, ridge_strengths, rungs
from redpass.analysis.widths.narrowing import Width, narrow
from redpass.analysis.widths.places import channel_places
from redpass.analysis.widths.statistics import View, views
from redpass.blocks import Blocks
from redpass.data import Batches
from redpass.facts import Facts
from redpass.lineage import extend
from redpass.passes.refit_projections import RefitProjections
from redpass.plan import Action
from redpass.program import Program

SHARES = (0.75, 0.5)
REPAIRED, FITTED = "repaired", "repaired, stream fitted"
METHODS = {
    REPAIRED: ("cost after repair", True),
    "repaired, by energy": ("energy", True),
    "unrepaired, by energy": ("energy", False),
    "unrepaired, by magnitude": ("magnitude", False),
    "repaired, random": ("random", True),
    "unrepaired, random": ("random", False),
}
"""Method -> how channels are chosen, and whether the reader is fitted anew."""
BEST_BARE = "unrepaired, by energy"
GOAL = 0.6


def cut_programs(
    bench: Bench, data: Batches, seed: int
) -> Iterator[tuple[str, float, Program, float]]:
    """Yields method, share, program and summed predicted loss, from one calibration run."""
    facts = Facts(bench.program, data)
    found = facts.get(channel_places)
    labels = [label for label, kind in found.kinds.items() if kind == "feed-forward"]
    places = [(label, found.by_label[label]) for label in labels if label not in found.obstacles]
    actions: dict[tuple[str, float], list[Action]] = {}
    losses: dict[tuple[str, float], float] = {}
    generator = torch.Generator().manual_seed(seed)
    for label, width, seen in views(bench.program, facts.get(structure), places, data, Blocks()):
        ranked = orders(width, seen, bench.program, generator)
        counts = [round(width.size * share / 8) * 8 for share in SHARES]
        for method, (order, refit) in METHODS.items():
            gone = ranked[order]
            strengths = ridge_strengths(width, seen, gone, min(counts)) if refit else {}
            made = rungs(width, seen, gone, counts, strengths)
            for share, rung in zip(SHARES, made, strict=True):
                edits = tuple(narrow(found.table, width, rung.keep, rung.repairs, bench.program))
                actions.setdefault((method, share), []).append(Action("cut", label, edits, ""))
                losses[method, share] = losses.get((method, share), 0.0) + rung.error
    for (method, share), chosen in actions.items():
        program = rewrite.apply(bench.program, chosen)
        yield method, share, program, losses[method, share]
        if method == REPAIRED:
            program = replace(program, lineage=extend(bench.program, bench.program, chosen))
            plan = RefitProjections().plan(program, Facts(program, data))
            yield FITTED, share, rewrite.apply(program, plan.actions), losses[method, share]


def orders(
    width: Width, seen: Sequence[View], program: Program, generator: torch.Generator
) -> Mapping[str, Tensor]:
    """Returns how channels are chosen -> the order in which they go."""
    least = round(width.size * min(SHARES) / 8) * 8
    size = torch.ones(width.size, dtype=torch.float64)
    for holder in width.holders:
        weight = program.weights[holder.weight].double().movedim(holder.axis, 0)
        if weight.dim() > 1:
            part = weight[holder.offset : holder.offset + width.size]
            size *= part.flatten(1).norm(dim=1)
    return {
        "cost after repair": removal_order(width, seen, least, refit=True),
        "energy": energy_scores(width, seen).argsort(),
        "magnitude": size.argsort(),
        "random": torch.randperm(width.size, generator=generator),
    }


def measure(bench: Bench, seed: int, data: Batches) -> Iterator[Record]:
    """Yields one record for each method and share."""
    for method, share, program, predicted in cut_programs(bench, data, seed):
        now = judged(bench, program)
        new, old = now["perplexity"].value, now["perplexity"].original
        yield {
            "method": method, "share": share, "perplexity": new, "original": old,
            "increase": math.log(new / old), "kl": now["kl"].value, "predicted": predicted,
        }  # fmt: skip


def table(found: Sequence[Mapping[str, object]]) -> Iterator[str]:
    """Yields the lines of the Markdown table, and the verdicts."""
    yield "| model | channels left | method | perplexity | loss increase | of unrepaired | kl |"
    yield "|---|---|---|---|---|---|---|"
    verdicts = []
    for model in dict.fromkeys(str(record["model"]) for record in found):
        for share in SHARES:
            rows = {m: made for m in (*METHODS, FITTED) if (made := _of(found, model, share, m))}
            bare = statistics.fmean(r["increase"] for r in rows[BEST_BARE])
            for method, records in rows.items():
                means = {
                    k: statistics.fmean(r[k] for r in records)
                    for k in ("perplexity", "increase", "kl")
                }
                spread = statistics.pstdev([r["increase"] for r in records])
                ratio = means["increase"] / bare
                yield (
                    f"| {model} ({records[0]['original']:.2f}) | {share:.0%} | {method} "
                    f"| {means['perplexity']:.2f} | {means['increase']:.4f} ± {spread:.4f} "
                    f"| {ratio:.2f} | {means['kl']:.4f} |"
                )
                if method in (REPAIRED, FITTED):
                    verdict = "met" if ratio <= GOAL else "missed"
                    verdicts.append(
                        f"{model}, {share:.0%} left, {method}: {ratio:.2f} of unrepaired: {verdict}"
                    )
    yield ""
    yield from (f"- {verdict}" for verdict in verdicts)


def _of(
    found: Sequence[Mapping[str, object]], model: str, share: float, method: str
) -> list[dict[str, Any]]:
    key = (model, share, method)
    return [dict(r) for r in found if (r["model"], r["share"], r["method"]) == key]


def page(found: Sequence[Mapping[str, object]]) -> Iterator[str]:
    """Yields the lines of the page."""
    runs = {(str(record["model"]), record["seed"]) for record in found}
    counted = Counter(model for model, _ in runs)
    seeds = ", ".join(f"{model}: {count}" for model, count in sorted(counted.items()))
    yield "# Feed-forward channels: which go, and what a repair brings"
    yield ""
    yield (
        f"Seeds ({seeds}) pick half of the calibration rows; loss increase in nats per token on "
        f"reporting rows; in brackets the original's perplexity. Goal: repaired at most {GOAL} of "
        f"'{BEST_BARE}'."
    )
    yield ""
    yield from table(found)


if __name__ == "__main__":
    run(__doc__, "width_channels", "gpt2,qwen3", measure, page)
