"""Recipes the leaderboard compares: ways to take a program down to a share of its cost.

A recipe is a function `(program, facts, budget, seed) -> program`. A pass adds its own as a line of
`RECIPES`.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from redpass import ops, rewrite
from redpass.analysis import structure
from redpass.analysis.similarity import similarity
from redpass.budget.accounting import cost_record, usual_sizes
from redpass.facts import Facts
from redpass.passes.drop_branches import DropBranches
from redpass.plan import Action
from redpass.program import Program

Budget = tuple[str, float]
"""A cost and the share of it to save."""
Recipe = Callable[[Program, Facts, Budget, int], Program]


@dataclass(frozen=True)
class Scene:
    """What an order may look at."""

    program: Program
    facts: Facts
    chance: random.Random


Order = Callable[[Scene, Action], float]
"""What goes first: the action with the smallest value."""


def by_similarity(scene: Scene, action: Action) -> float:
    """The branch that turns the stream least goes first."""
    return -scene.facts.get(similarity).branches[action.target].cosine


def by_chance(scene: Scene, _: Action) -> float:
    """Control: any order."""
    return scene.chance.random()


def by_magnitude(scene: Scene, action: Action) -> float:
    """Control: the branch with the smallest output projection goes first."""
    exits = {branch.label: branch.exit for branch in scene.facts.get(structure).branches}
    return output_norm(scene.program, exits[action.target])


def output_norm(program: Program, exit_name: str) -> float:
    """Returns the norm of the matrix nearest to a branch's exit."""
    todo = [program.nodes[exit_name]]
    while todo:
        node = todo.pop(0)
        for operand in node.all_input_nodes:
            weight = program.weight(operand)
            if weight is not None and weight.dim() >= 2:
                return weight.float().norm().item()
        todo += [operand for operand in node.all_input_nodes if ops.is_float(operand)]
    return float("inf")


def dropping(order: Order) -> Recipe:
    """Returns a recipe that drops branches in `order` while the share to save is not exceeded."""

    def recipe(program: Program, facts: Facts, budget: Budget, seed: int) -> Program:
        what, share = budget
        scene = Scene(program, facts, random.Random(seed))
        actions = DropBranches().plan(program, facts).actions
        target = share * getattr(cost_record(program, usual_sizes(program)), what)
        chosen, saved = [], 0.0
        for action in sorted(actions, key=lambda action: order(scene, action)):
            if 0 < action.saving[what] <= target - saved:
                chosen.append(action)
                saved += action.saving[what]
        return rewrite.apply(program, chosen)

    return recipe


RECIPES: Mapping[str, Recipe] = {
    "similar": dropping(by_similarity),
    "random": dropping(by_chance),
    "magnitude": dropping(by_magnitude),
}
CONTROLS = ("random", "magnitude")
"""Recipes that know nothing of the data: a line that does not beat them is worth nothing."""
