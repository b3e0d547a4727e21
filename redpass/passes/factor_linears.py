"""Writes linears as two thin ones: the product of least error on the inputs they really get.

                                t = linear(x, down)        [rank, ins]
y = linear(x, w, b)      ->     y = linear(t, up, b')      [outs, rank]
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from redpass.analysis import cost
from redpass.analysis.inspection import DEFAULT_SIZES
from redpass.analysis.ranks.sites import Sites, sites
from redpass.analysis.ranks.truncation import LowRank, by_fisher, plain, whitened
from redpass.analysis.rungs import check_rungs, check_word, read_target
from redpass.errors import UsageError
from redpass.facts import Facts
from redpass.plan import Action, Exactness, Plan, Skip
from redpass.program import Program

RULE = "factor_linears.truncation"
SCORES = {"stream": whitened, "fisher": by_fisher}


@dataclass(frozen=True)
class FactorLinears:
    """Factors linears into two thin ones of low rank.

    What: any linear with a plain matrix: one projection, or several fused in one; a weight that
    several linears read is cut in all of them at once. A bias stays, and makes up for the mean of
    what is cut. Each rank of the ladder is a candidate; a weight that is of low rank already is
    one that costs nothing.
    When: never by itself. Only at ranks at which the two hold fewer numbers than the one. The
    predicted loss is the error put into the residual stream: `redpass.analysis.ranks.truncation`.
    Not tried: weights that something else than a linear reads, quantised or computed weights,
    stacks of experts, linears that are one of two thin ones already.
    Costs: one calibration run, one eigenproblem a weight. Candidates hold their weights. With
    fewer tokens than channels losses are mostly a guess: evidence has the number of tokens.
    Source: SVD-LLM (Wang et al. 2024, arXiv:2403.07378), ASVD (Yuan et al. 2023,
    arXiv:2312.05821).

    Attributes:
        shares: what is left of a weight's numbers, the ladder.
        multiple: ranks are rounded down to multiples of this.
        score: what losses are predicted in: `stream`, or `fisher`, nats of the output from one
            backward run (not to be compared with other passes' unless ladders are measured).
        whiten: False truncates the weight as a matrix, whatever it reads: a control; then no data
            are needed.
        only: targets (`layers.0.mlp.up@64`) to cut; nothing else is planned.
    """

    name: ClassVar[str] = "factor_linears"
    needs: ClassVar[tuple[Any, ...]] = (sites, cost, whitened, by_fisher, plain)
    exactness: ClassVar[Exactness] = Exactness.APPROXIMATE
    fits: ClassVar[bool] = True

    shares: tuple[float, ...] = (0.75, 0.5, 0.25)
    multiple: int = 8
    score: str = "stream"
    whiten: bool = True
    only: tuple[str, ...] = ()

    def plan(self, program: Program, facts: Facts) -> Plan:
        """Plans one action a site and rank, the least predicted loss first."""
        self._check()
        known = facts.get(sites)
        wanted = dict(self._named(known))
        skips = tuple(Skip(RULE, label, reason) for label, reason in known.skips.items())
        if not known.found:
            return Plan(skips=skips)
        cuts = facts.get(SCORES[self.score] if self.whiten else plain)
        items = [
            item
            for label, site in known.found.items()
            if not self.only or label in wanted
            for item in self._rungs(program, facts, cuts[label], wanted.get(label, ()))
            if site.break_even
        ]
        plan = Plan.of(items)
        actions = sorted(plan.actions, key=lambda action: action.loss or 0.0)
        return Plan(tuple(actions), plan.skips + (() if self.only else skips))

    def _check(self) -> None:
        check_rungs(self.name, self.shares, self.multiple)
        check_word(self.name, "score", self.score, SCORES)

    def _named(self, known: Sites) -> Mapping[str, tuple[int, ...]]:
        """Label -> the ranks that the user named."""
        found: dict[str, tuple[int, ...]] = {}
        for target in self.only:
            label, rank = read_target(self.name, target, {**known.found, **known.skips}, "linear")
            if label in known.skips:
                raise UsageError(known.skips[label], place=label, hint="leave it out of `only`")
            known.found[label].check(rank)
            found[label] = (*found.get(label, ()), rank)
        return found

    def _rungs(
        self, program: Program, facts: Facts, item: LowRank, named: tuple[int, ...]
    ) -> Iterator[Action | Skip]:
        site, ranks = item.site, named or item.ranks(self.shares, self.multiple)
        if not ranks:
            reason = f"no multiple of {self.multiple} is a rank that saves at {site.shape}"
            yield Skip(RULE, site.label, reason)
        for rank in ranks:
            yield _cut(program, facts, item, rank)


def _cut(program: Program, facts: Facts, item: LowRank, rank: int) -> Action:
    site, loss = item.site, item.loss(rank)
    outs, ins = site.shape
    gone = outs * ins - site.size(rank)
    flops = sum(facts.get(cost).flops_of(x.node, DEFAULT_SIZES) for x in site.linears)
    weight = program.weights[site.linears[0].weight]
    free = "; the weight is of that rank" if rank >= item.own else ""
    return Action(
        RULE,
        f"{site.label}@{rank}",
        item.edits(program, rank),
        f"{outs} x {ins} as two linears of rank {rank}{free}",
        {
            "rank": rank,
            "tokens": item.tokens,
            "channels": ins,
            "left": site.size(rank) / outs / ins,
        },
        {
            "parameters": gone,
            "bytes": gone * weight.element_size(),
            "flops": flops * gone / (outs * ins),
            "kv_bytes_per_token": 0,
        },
        loss,
        f"{site.label}/rank",
    )
