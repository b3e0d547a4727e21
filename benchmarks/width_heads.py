"""Fewer attention heads on the trained models of the test bed, against controls.

    python benchmarks/width_heads.py --model gpt2 --seeds 0,1,2

`clusters`: heads that look at the same tokens share queries and keys (`cluster_heads`), against
clusters of the same sizes with members drawn by chance; the same share of heads in every layer, or
`allocated`: counts by layer from the predicted losses (`redpass.budget.allocation`). `pruning`:
whole heads go (`prune_heads`), by measured contribution, by the norm of their columns of the output
projection, and by chance. Each with the output projection as it was and fitted anew. A
seed picks half of the calibration rows, and what is drawn; figures are from reporting rows. Written
to `results/width_heads.json` after each result, which are not made again, and the tables anew.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.leaderboard import Bench, judged, prepare
from redpass import rewrite
from redpass.analysis.heads.clusters import clusters, random_clusters
from redpass.analysis.heads.contributions import head_contributions, magnitudes
from redpass.analysis.heads.cuts import edits
from redpass.analysis.heads.fits import HeadFits
from redpass.analysis.heads.ladders import Offer, cluster_offer, counts_of, prune_offers
from redpass.analysis.heads.similarity import head_similarity
from redpass.analysis.heads.sites import HeadSite, head_sites
from redpass.budget.allocation import allocated
from redpass.budget.candidates import Candidate
from redpass.data import Batches
from redpass.facts import Facts
from redpass.passes.cluster_heads import ClusterHeads
from redpass.plan import Action, ResizeState

SHARES = (0.75, 0.5)
METHODS = (
    "allocated clusters, alike", "allocated clusters, random",
    "clusters, alike", "clusters, random",
    "pruning, contribution", "pruning, magnitude", "pruning, random",
)  # fmt: skip
OUT = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Task:
    """One seed of one model: its facts with half of the calibration rows."""

    bench: Bench
    facts: Facts
    seed: int

    @cached_property
    def ladder(self) -> list[Candidate]:
        """Steps of all layers to fewer clusters, in the order in which to take them."""
        fits, pool = HeadFits(self.bench.program, self.facts.data()), list[Candidate]()
        for site in self.facts.get(head_sites).found.values():
            offers = {n: self.alike(site, n)[1] for n in range(1, site.heads)}
            found = fits.fits(site, {n: offer.cut for n, offer in offers.items()}, refit=True)
            for count, fit in found.items():
                assert not isinstance(fit, str), fit
                saving = {"heads": float(site.heads - count)}
                target = f"{site.label}@{count}"
                action = Action("heads", target, (), "", {}, saving, fit.loss, place=site.label)
                pool.append(Candidate(ClusterHeads(), action))
        return allocated(pool, lambda action: action.saving["heads"])

    def counts(self, share: float) -> dict[str, int]:
        """Returns how many clusters each layer gets, by label, so that a share of all is left."""
        sites = self.facts.get(head_sites).found
        counts = {label: site.heads for label, site in sites.items()}
        least = share * sum(counts.values())
        for candidate in self.ladder:
            label, _, count = candidate.action.target.partition("@")
            if sum(counts.values()) - counts[label] + int(count) >= least:
                counts[label] = int(count)
        return counts

    def alike(self, site: HeadSite, count: int, *, random: bool = False) -> tuple[int, Offer]:
        """Returns clusters of heads that are alike, or of the same sizes by chance."""
        costs = self.facts.get(head_similarity)[site.label].distances
        found = clusters(costs, count, site.groups)
        if random:
            found = random_clusters(found, costs, 1000 * self.seed + site.branch.layer)
        made = cluster_offer(site, found, "gather")
        assert isinstance(made, Offer), made
        return count, made

    def offer(self, site: HeadSite, method: str, share: float) -> tuple[int, Offer]:
        """Returns the cut of one layer, and how many heads it leaves."""
        if "clusters" in method:
            same = counts_of(site.heads, [share])[0]
            count = self.counts(share)[site.label] if method.startswith("allocated") else same
            return self.alike(site, count, random=method.endswith("random"))
        scores = self.scores(site, method)
        count, made = next(iter(prune_offers(site, scores, [share], ()).items()))
        assert isinstance(made, Offer), made
        return count, made

    def scores(self, site: HeadSite, method: str) -> tuple[float, ...]:
        """Returns what heads are kept by."""
        if method.endswith("contribution"):
            return self.facts.get(head_contributions)[site.label]
        if method.endswith("magnitude"):
            return magnitudes(site)
        chance = random.Random(1000 * self.seed + site.branch.layer)
        return tuple(chance.random() + 0.1 for _ in range(site.heads))

    def results(self, method: str, share: float) -> Iterator[tuple[str, dict[str, float]]]:
        """Yields the figures with output projections as they were, and fitted anew."""
        fits = HeadFits(self.bench.program, self.facts.data())
        cuts: dict[str, list[Action]] = {"": [], ", refitted": []}
        for site in self.facts.get(head_sites).found.values():
            if method.startswith("allocated") and self.counts(share)[site.label] == site.heads:
                continue
            count, offer = self.offer(site, method, share)
            fit = fits.fits(site, {count: offer.cut}, refit=True)[count]
            assert not isinstance(fit, str), fit
            pairs = (("", offer.cut, fit.unfitted), (", refitted", fit.cut, fit.loss))
            for word, cut, loss in pairs:
                made = edits(site, cut, "heads")
                cuts[word].append(Action("heads", site.label, made, "", {}, {}, loss))
        for word, actions in cuts.items():
            yield f"{method}{word}", self.figures(actions)

    def figures(self, actions: list[Action]) -> dict[str, float]:
        """Returns quality, predicted loss, and how much of the K and V caches is left."""
        program = rewrite.apply(self.bench.program, actions)
        found = {name: value.value for name, value in judged(self.bench, program).items()}
        sizes = [e for a in actions for e in a.edits if isinstance(e, ResizeState)]
        heads = sum(s.heads for s in self.facts.get(head_sites).found.values())
        predicted = sum(action.loss or 0.0 for action in actions)
        return found | {"predicted": predicted, "caches cut": len(sizes), "heads": heads}


def tasks(bench: Bench, seeds: list[int]) -> Iterator[Task]:
    """Yields a task for each seed."""
    for seed in seeds:
        size = max(2, len(bench.calibration) // 2)
        picked = sorted(random.Random(seed).sample(range(len(bench.calibration)), size))
        data = Batches(tuple(bench.calibration[number] for number in picked))
        yield Task(bench, Facts(bench.program, data), seed)


def increase(figures: Mapping[str, float], whole: Mapping[str, float]) -> float:
    """Returns by how much the loss, in nats a token, is higher than the model's own."""
    return math.log(figures["perplexity"]) - math.log(whole["perplexity"])


def table(name: str, kept: Mapping[str, object]) -> list[str]:
    """Returns one model's table as Markdown."""
    runs, whole = kept["runs"], kept["whole"]
    assert isinstance(runs, dict)
    assert isinstance(whole, dict)
    lines = [f"## {name}", "", f"Perplexity of the whole model {whole['perplexity']:.3f}.", ""]
    head = [f"{round(100 * share)}% of the heads" for share in SHARES]
    lines += [f"| loss increase, nats a token | {' | '.join(head)} |", "|---|---|---|"]
    means: dict[tuple[str, float], float] = {}
    for method in [m + word for m in METHODS for word in ("", ", refitted")]:
        cells = []
        for share in SHARES:
            done = [run for run in runs.values() if str(share) in run.get(method, {})]
            found = [increase(run[method][str(share)], whole) for run in done] or [math.nan]
            means[method, share] = statistics.fmean(found)
            shown = f"{means[method, share]:.4f} ({min(found):.4f} to {max(found):.4f})"
            shown += f", {len(done)} seeds" if len(done) < len(runs) else ""
            cells.append(shown if done else "not measured")
        lines.append(f"| {method} | {' | '.join(cells)} |")
    lines += ["", f"| ratio | {' | '.join(head)} |", "|---|---|---|"]
    for text, one, other in RATIOS:
        ratios = [means[one, share] / means[other, share] for share in SHARES]
        cells = ["not measured" if math.isnan(ratio) else f"{ratio:.2f}" for ratio in ratios]
        lines.append(f"| {text} | {' | '.join(cells)} |")
    return [*lines, "", f"{len(runs)} seeds: mean (least to most).", ""]


RATIOS = (
    ("allocated clusters: alike / random",
     "allocated clusters, alike", "allocated clusters, random"),
    ("allocated clusters, refitted: alike / random",
     "allocated clusters, alike, refitted", "allocated clusters, random, refitted"),
    ("clusters: allocated / not", "allocated clusters, alike", "clusters, alike"),
    ("clusters: alike / random", "clusters, alike", "clusters, random"),
    ("clusters, refitted: alike / random",
     "clusters, alike, refitted", "clusters, random, refitted"),
    ("clusters: refitted / not", "clusters, alike, refitted", "clusters, alike"),
    ("pruning: contribution / random", "pruning, contribution", "pruning, random"),
    ("pruning: contribution / magnitude", "pruning, contribution", "pruning, magnitude"),
    ("pruning, refitted: contribution / random",
     "pruning, contribution, refitted", "pruning, random, refitted"),
    ("pruning: refitted / not", "pruning, contribution, refitted", "pruning, contribution"),
)  # fmt: skip


def write(path: Path, kept: Mapping[str, object]) -> None:
    """Writes the JSON file and the tables beside it."""
    path.write_text(json.dumps(kept, indent=1))
    lines = ["# Fewer attention heads", "", *(__doc__ or "").split("\n\n")[2].split("\n"), ""]
    for name, found in kept.items():
        assert isinstance(found, dict)
        lines += table(name, found)
    path.with_suffix(".md").write_text("\n".join(lines))


def main() -> None:
    """Runs the seeds that are asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--rows", type=int, default=16, help="calibration rows")
    parser.add_argument("--reporting", type=int, default=32)
    parser.add_argument("--batch", type=int, default=4)
    options = parser.parse_args()
    torch.set_num_threads(1)
    bench = prepare(options.model, options.rows, options.batch, options.reporting)
    path = OUT / "width_heads.json"
    whole = {name: value.value for name, value in judged(bench, bench.program).items()}
    for task in tasks(bench, [int(seed) for seed in options.seeds.split(",")]):
        for method, share in product(METHODS, SHARES):
            kept = json.loads(path.read_text()) if path.exists() else {}
            mine = kept.setdefault(options.model, {"whole": whole, "runs": {}})
            run = mine["runs"].setdefault(str(task.seed), {})
            if str(share) in run.get(method, {}):
                continue
            started = time.perf_counter()
            for label, figures in task.results(method, share):
                run.setdefault(label, {})[str(share)] = figures
                print(f"{label} {share}: {increase(figures, whole):.4f}", flush=True)
            print(f"  {time.perf_counter() - started:.1f} s", flush=True)
            write(path, kept)


if __name__ == "__main__":
    main()
