"""Drops branches that barely turn the residual stream.

x1 = x + attention(norm(x))        x1 = x
x2 = x1 + mlp(norm(x1))      ->    x2 = x1 + mlp(norm(x1))
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from redpass.analysis import cost, structure
from redpass.analysis.similarity import similarity
from redpass.analysis.structure import Branch
from redpass.errors import UsageError, nearest
from redpass.facts import Facts
from redpass.passes.depth import NO_STREAM, drop_branch, saving
from redpass.plan import Action, Exactness, Plan, Skip
from redpass.program import Program

RULE = "drop_branches.similar"


@dataclass(frozen=True)
class DropBranches:
    """Removes attention and feed-forward branches the model hardly needs.

    What: for a branch with `x' = x + b(x)`, the readers of `x'` read `x`; an attention's cache
    entries leave the inputs and outputs with it. In post-norm models the norm after the add stays;
    of parallel branches the others stay in the sum.
    When: never by itself. Each branch is a candidate with its predicted loss, `1 - E cos(x', x)`
    over calibration tokens; a budget decides, branch by branch, on measured quality.
    Not tried: any repair of what stays (`refit_projections` does that), or whole layers at once
    (`drop_layers`, `drop_span`).
    Costs: one calibration run, and quality measurements.
    Source: LLM-Drop (He et al. 2024, arXiv:2406.15786), after ShortGPT (Men et al. 2024);
    BlockPruner (Zhong et al. 2024, arXiv:2406.10594) for dropping one at a time on measured loss.

    Attributes:
        kinds: which branches are candidates.
        min_similarity: candidates below this mean cosine are not tried.
        only: labels of the branches to drop; then no data is needed and nothing else is planned.
    """

    name: ClassVar[str] = "drop_branches"
    needs: ClassVar[tuple[Any, ...]] = (structure, cost, similarity)
    exactness: ClassVar[Exactness] = Exactness.APPROXIMATE

    kinds: tuple[str, ...] = ("attention", "feed-forward", "experts")
    min_similarity: float = 0.0
    only: tuple[str, ...] = ()

    def plan(self, program: Program, facts: Facts) -> Plan:
        """Plans one action a candidate, the least loss first."""
        branches = facts.get(structure).branches
        if not branches:
            return Plan(skips=(Skip(RULE, "graph", NO_STREAM),))
        if self.only:
            return Plan.of(self._drop(b, None, facts) for b in self._chosen(branches))
        plan = Plan.of(self._judge(branch, facts) for branch in branches)
        return Plan(tuple(sorted(plan.actions, key=lambda a: a.loss or 0.0)), plan.skips)

    def _chosen(self, branches: tuple[Branch, ...]) -> Iterator[Branch]:
        known = {branch.label: branch for branch in branches}
        for label in self.only:
            if label not in known:
                hint = nearest(label, known)
                raise UsageError(f"no branch is called '{label}'", place=self.name, hint=hint)
            yield known[label]

    def _judge(self, branch: Branch, facts: Facts) -> Action | Skip:
        if branch.kind not in self.kinds:
            return Skip(RULE, branch.label, f"a branch of kind '{branch.kind}' is not a candidate")
        cosine = facts.get(similarity).branches[branch.label].cosine
        if cosine < self.min_similarity:
            reason = f"similarity {cosine:.4f} is below {self.min_similarity}"
            return Skip(RULE, branch.label, reason)
        return self._drop(branch, cosine, facts)

    def _drop(self, branch: Branch, cosine: float | None, facts: Facts) -> Action:
        shown = "named by the user"
        if cosine is not None:
            shown = f"mean cosine {cosine:.4f} between the stream with and without it"
        return Action(
            RULE,
            branch.label,
            drop_branch(branch),
            f"{branch.kind} branch, {shown}",
            {} if cosine is None else {"similarity": cosine},
            saving(facts, [branch]),
            None if cosine is None else 1.0 - cosine,
        )
