"""Running changed programs from their first change on: the same numbers, and less work."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "analysis"))
import zoo

from redpass import rewrite
from redpass.analysis import structure
from redpass.data import Batches
from redpass.facts import Facts
from redpass.passes.drop_branches import DropBranches
from redpass.program import Program
from redpass.verify.inputs import complete, random_inputs
from redpass.verify.prefix import Prefix


@pytest.fixture(scope="module", params=["llama", "gpt_neox", "bert"])
def program(request) -> Program:
    return zoo.load(request.param)


def port(program: Program) -> str:
    return program.signature.outputs[0].name


def batches(program: Program, count: int = 3) -> Batches:
    sizes = {"batch": 2, "seq": 7, "past": 0}
    known = {k: v for k, v in sizes.items() if k in program.signature.dims}
    return Batches(tuple(random_inputs(program, known, seed=i) for i in range(count)))


def without(program: Program, *places: int) -> Program:
    labels = [structure(program).branches[place].label for place in places]
    plan = DropBranches(only=tuple(labels)).plan(program, Facts(program))
    return rewrite.apply(program, plan.actions)


def calls(program: Program) -> int:
    return sum(node.op == "call_function" for node in program.graph.nodes)


def whole(program: Program, data: Batches, number: int) -> torch.Tensor:
    return program(**complete(program, data[number]))[0]


def test_the_output_is_that_of_a_whole_run_bit_for_bit(program):
    data = batches(program)
    prefix = Prefix(program, data, port(program))
    for places in ((), (0,), (1,), (3,), (0, 2), (1, 3)):
        changed = without(program, *places) if places else program
        for number in range(len(data)):
            found = prefix.output(changed, number)
            assert torch.equal(found, whole(changed, data, number)), places


def test_candidates_late_in_the_model_cost_their_own_part_only(program):
    data = batches(program)
    prefix = Prefix(program, data, port(program))
    last = without(program, 3)
    prefix.output(last, 0)
    before = prefix.executed
    assert before <= calls(program) + calls(last)
    again = without(program, 3)
    prefix.output(again, 0)
    assert prefix.executed - before < 0.4 * calls(again)


def test_a_base_that_was_replaced_hands_on_what_is_still_true(program):
    data = batches(program)
    prefix = Prefix(program, data, port(program))
    accepted = without(program, 2)
    prefix.output(accepted, 0)
    prefix.move(accepted)
    before = prefix.executed
    more = without(accepted, 2)
    assert torch.equal(prefix.output(more, 0), whole(more, data, 0))
    assert prefix.executed - before < 0.6 * calls(more)


def test_beyond_the_memory_bound_values_are_computed_again(program):
    data = batches(program)
    small = Prefix(program, data, port(program), limit=0)
    changed = without(program, 3)
    assert torch.equal(small.output(changed, 1), whole(changed, data, 1))
    assert small.bytes == 0
    before = small.executed
    small.output(changed, 1)
    assert small.executed - before > 0.5 * calls(changed)


def test_kept_values_stay_within_the_bound(program):
    data = batches(program)
    free = Prefix(program, data, port(program))
    for number in range(3):
        free.output(without(program, 3), number)
    bound = Prefix(program, data, port(program), limit=free.bytes // 2)
    for number in range(3):
        bound.output(without(program, 3), number)
    assert 0 < bound.bytes <= free.bytes // 2
