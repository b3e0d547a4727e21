"""Dropping any branch found is the same as zeroing what it adds, on every architecture."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx
from zoo import BUILDERS, load

from redpass.analysis.structure import Branch, structure
from redpass.frontend import random_inputs
from redpass.plan import Action, DropState, Edit, Replace
from redpass.program import Program, interpret
from redpass.rewrite import apply


@pytest.mark.parametrize("name", BUILDERS)
def test_dropping_a_branch_is_adding_zero(name: str) -> None:
    program = load(name)
    inputs = random_inputs(program, seed=1)
    branches = structure(program).branches
    assert branches
    for branch in branches:
        check_drop(program, branch, inputs)


def check_drop(program: Program, branch: Branch, inputs: dict[str, Tensor]) -> None:
    edits: list[Edit] = [Replace(branch.join, branch.other)]
    edits += [DropState(*pair) for pair in branch.state]
    dropped = apply(program, [Action("test.drop", branch.label, tuple(edits), "test")])
    gone = {pair[1] for pair in branch.state}

    def silence(node: fx.Node, value: Tensor) -> Tensor:
        return value * 0 if node.name == branch.exit else value

    names = [port.name for port in program.signature.inputs]
    expected = interpret(program, [inputs[name] for name in names], silence)
    actual = dropped(**{port.name: inputs[port.name] for port in dropped.signature.inputs})
    kept = [
        value
        for port, value in zip(program.signature.outputs, expected, strict=True)
        if port.name not in gone
    ]
    for want, have in zip(kept, actual, strict=True):
        torch.testing.assert_close(have, want, rtol=1e-5, atol=1e-6)
    left = set(dropped.nodes)
    assert not left & branch.nodes, f"{branch.label}: nodes it said were its own are still there"
