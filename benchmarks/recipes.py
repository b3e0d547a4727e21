"""Recipes the leaderboard compares: ways to take amounts of a cost off a program.

A recipe is a function `task -> programs`, one program for each target of the task, all of equal
cost up to what its pieces allow. A pass adds its own as a line of `RECIPES`.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from redpass import ops, rewrite
from redpass.analysis import structure
from redpass.budget import choose
from redpass.data import Batches
from redpass.facts import Facts
from redpass.lineage import extend
from redpass.passes.drop_branches import DropBranches
from redpass.passes.drop_layers import DropLayers
from redpass.passes.drop_span import DropSpan
from redpass.passes.map_stream import MapStream
from redpass.passes.refit_projections import RefitProjections
from redpass.plan import Action, Pass
from redpass.program import Program

ROUNDING = 1.001
"""How far a choice may exceed its target: layers that differ by a bias count as equal."""


@dataclass(frozen=True)
class Task:
    """What a recipe is asked for.

    Attributes:
        data: the calibration rows of one seed: all that a recipe may look at.
        cost: what is to be saved: `parameters`, `flops` or `kv_bytes_per_token`.
        whole: how much of it all layers cost together.
        targets: how much of it to save, absolute amounts, rising.
    """

    program: Program
    data: Batches
    cost: str
    whole: float
    targets: tuple[float, ...]
    seed: int
    done: dict[str, list[Program]] = field(default_factory=dict)

    @cached_property
    def facts(self) -> Facts:
        """Facts of the program with the calibration data."""
        return Facts(self.program, self.data)

    @cached_property
    def chance(self) -> random.Random:
        """Random numbers of this seed."""
        return random.Random(self.seed)

    def made(self, name: str) -> list[Program]:
        """Returns what a recipe gives, made once."""
        if name not in self.done:
            self.done[name] = RECIPES[name](self)
        return self.done[name]

    def programs(self, ranked: Sequence[Action]) -> list[Program]:
        """Returns the program for each target with as many of `ranked`, in order, as fit in it."""
        return [self.with_actions(self.fitting(ranked, target)) for target in self.targets]

    def with_actions(self, actions: Sequence[Action]) -> Program:
        """Returns the program with actions applied, knowing where it came from."""
        after = rewrite.apply(self.program, actions)
        return replace(after, lineage=extend(self.program, self.program, actions))

    def fitting(self, ranked: Iterable[Action], target: float) -> list[Action]:
        """Returns the actions, taken in order, whose saving together does not exceed `target`."""
        chosen, saved = list[Action](), 0.0
        for action in ranked:
            if 0 < action.saving[self.cost] <= ROUNDING * target - saved:
                chosen.append(action)
                saved += action.saving[self.cost]
        return chosen


Recipe = Callable[[Task], list[Program]]
Order = Callable[[Task, Action], float]
"""What goes first: the action with the smallest value."""


def by_score(_: Task, action: Action) -> float:
    """The pass's own score: what turns the stream least goes first."""
    return action.loss or 0.0


def by_chance(task: Task, _: Action) -> float:
    """Control: any order."""
    return task.chance.random()


def by_magnitude(task: Task, action: Action) -> float:
    """Control: the branch with the smallest output projection goes first."""
    exits = {branch.label: branch.exit for branch in task.facts.get(structure).branches}
    return output_norm(task.program, exits[action.target])


def output_norm(program: Program, exit_name: str) -> float:
    """Returns the norm of the matrix nearest to a branch's exit."""
    todo = [program.nodes[exit_name]]
    while todo:
        node = todo.pop(0)
        for operand in node.all_input_nodes:
            weight = program.weight(operand)
            if weight is not None and weight.dim() >= 2:
                return float(weight.float().norm())
        todo += [operand for operand in node.all_input_nodes if ops.is_float(operand)]
    return float("inf")


def ranked(pass_: Pass, order: Order) -> Recipe:
    """Returns a recipe that takes the candidates of a pass at once, in an order."""

    def recipe(task: Task) -> list[Program]:
        actions = pass_.plan(task.program, task.facts).actions
        return task.programs(sorted(actions, key=lambda action: order(task, action)))

    return recipe


def smallest_angle(task: Task) -> list[Program]:
    """Drops, for each target, of the longest spans that fit the one with the smallest angle."""
    spans = DropSpan().plan(task.program, task.facts).actions
    spans += DropLayers().plan(task.program, task.facts).actions  # spans of one layer
    programs = []
    for target in task.targets:
        fit = [span for span in spans if 0 < span.saving[task.cost] <= ROUNDING * target]
        most = max((span.saving[task.cost] for span in fit), default=0.0)
        longest = [span for span in fit if span.saving[task.cost] * ROUNDING >= most]
        best = sorted(longest, key=lambda span: by_score(task, span))[:1]
        programs.append(task.with_actions(best))
    return programs


def searched(passes: str, search: str = "greedy") -> Recipe:
    """Returns a recipe that lets `redpass.budget.choose` pick candidates one at a time.

    One search goes a little beyond the largest target; the smaller ones are its first steps.
    """

    def recipe(task: Task) -> list[Program]:
        largest = task.whole / len(task.facts.get(structure).layers)
        chosen = choose(
            task.program,
            passes,
            share=min(0.95, (task.targets[-1] + largest) / task.whole),
            data=task.data,
            cost=task.cost,
            search=search,
            seed=task.seed,
        )
        return task.programs(chosen.actions)

    return recipe


def repaired(name: str, *repairs: Pass) -> Recipe:
    """Returns a recipe that repairs what another one made, by one pass after the other."""

    def recipe(task: Task) -> list[Program]:
        return [_repaired(program, task, repairs) for program in task.made(name)]

    return recipe


def _repaired(program: Program, task: Task, repairs: Sequence[Pass]) -> Program:
    for pass_ in repairs:
        actions = pass_.plan(program, Facts(program, task.data)).actions
        program = rewrite.apply(program, actions)
    return program


RECIPES: Mapping[str, Recipe] = {
    "greedy on branches": searched("drop_branches"),
    "greedy on branches + refit": repaired("greedy on branches", RefitProjections()),
    "greedy on layers": searched("drop_layers"),
    "greedy on layers + refit": repaired("greedy on layers", RefitProjections()),
    "greedy on layers + map": repaired("greedy on layers", MapStream()),
    "greedy on layers + map + refit": repaired("greedy on layers", MapStream(), RefitProjections()),
    "greedy on layers or reuse": searched("drop_layers,reuse_layers"),
    "branch similarity": ranked(DropBranches(), by_score),
    "block influence": ranked(DropLayers(), by_score),
    "block influence + refit": repaired("block influence", RefitProjections()),
    "angular span": smallest_angle,
    "shared layers": searched("share_layers", "one-shot"),
    "random branches": ranked(DropBranches(), by_chance),
    "random layers": ranked(DropLayers(), by_chance),
    "magnitude": ranked(DropBranches(), by_magnitude),
}
CONTROLS = ("random branches", "random layers", "magnitude")
"""Recipes that know nothing of the data: a line that does not beat them is worth nothing."""
