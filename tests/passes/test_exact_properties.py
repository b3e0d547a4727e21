"""Properties that hold for every exact cleanup pass on any graph, tried on generated ones."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from building import Builder, aten, special_values
from checking import check_numbers, is_same_bits, run_pass
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import fx

from redpass.passes.drop_dead_nodes import DropDeadNodes
from redpass.passes.drop_neutral_operands import DropNeutralOperands
from redpass.passes.drop_noops import DropNoops
from redpass.passes.fold_constants import FoldConstants
from redpass.passes.merge_equal_nodes import MergeEqualNodes
from redpass.passes.merge_equal_sizes import MergeEqualSizes
from redpass.passes.shorten_chains import ShortenChains
from redpass.passes.tie_equal_weights import TieEqualWeights
from redpass.program import Program

PASSES = (
    DropNoops(),
    DropNeutralOperands(),
    ShortenChains(),
    MergeEqualSizes(),
    FoldConstants(max_bytes=100),
    MergeEqualNodes(),
    TieEqualWeights(min_bytes=0),
    DropDeadNodes(),
)

UNARY: tuple[Any, ...] = (
    lambda b, v: b.call(aten.relu.default, v),
    lambda b, v: b.call(aten.neg.default, v),
    lambda b, v: b.call(aten.exp.default, v),
    lambda b, v: b.call(aten.sum.dim_IntList, v, [-1]),
    lambda b, v: b.call(aten.mul.Tensor, v, 1),
    lambda b, v: b.call(aten.mul.Tensor, v, 2.0),
    lambda b, v: b.call(aten.add.Tensor, v, 0.0),
    lambda b, v: b.call(aten.add.Tensor, v, -0.0),
    lambda b, v: b.call(aten.sub.Tensor, v, 0),
    lambda b, v: b.call(aten.div.Tensor, v, 1.0),
    lambda b, v: b.call(aten.transpose.int, v, -1, -2),
    lambda b, v: b.call(aten.transpose.int, v, 0, 1),
    lambda b, v: b.call(aten.contiguous.default, v),
    lambda b, v: b.call(aten.clone.default, v),
    lambda b, v: b.call(aten.reshape.default, v, [-1, 4, 4]),
    lambda b, v: b.call(aten.reshape.default, v, [-1, 16]),
    lambda b, v: b.call(aten.view.default, v, [-1, 4, 4]),
    lambda b, v: b.call(aten.view.default, v, [-1, 2, 8]),
    lambda b, v: b.call(aten.unsqueeze.default, v, 0),
    lambda b, v: b.call(aten.squeeze.dim, v, 0),
    lambda b, v: b.call(aten.slice.Tensor, v, -1, 0, 4),
    lambda b, v: b.call(aten.slice.Tensor, v, -1, 1, 3),
    lambda b, v: b.call(aten.expand.default, v, [-1, 4, 4]),
    lambda b, v: b.call(aten.permute.default, v, [0, 2, 1]),
    lambda b, v: b.call(aten.to.dtype, v, torch.float64),
    lambda b, v: b.call(aten.to.dtype, v, torch.float32),
    lambda b, v: b.call(aten.dropout.default, v, 0.1, False),
    lambda b, v: b.call(aten.cat.default, [v, v], 0),
    lambda b, v: b.call(aten.view.default, v, [b.call(aten.sym_size.int, v, 0), -1]),
    lambda b, v: b.call(aten.ones_like.default, v),
)
BINARY = (aten.add.Tensor, aten.mul.Tensor, aten.sub.Tensor, aten.maximum.default)


def start(b: Builder) -> list[fx.Node]:
    matrix = torch.arange(16.0).reshape(4, 4)
    return [
        b.input("x", "batch", 4, 4),
        b.input("y", "batch", 4, 4),
        b.weight("a", matrix),
        b.weight("a_again", matrix.clone()),
        b.weight("a_turned", matrix.t().contiguous()),
        b.weight("one", torch.tensor(1.0)),
        b.call(aten.arange.default, 4, dtype=torch.float32),
    ]


@pytest.fixture(scope="module", autouse=True)
def quiet() -> Iterator[None]:
    """Impossible ops are part of the game here; torch logs each with its traceback."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    yield
    logger.setLevel(level)


@st.composite
def programs(draw: st.DrawFn) -> Program:
    """A program of up to 14 random ops on what came before; impossible ones are left out."""
    b = Builder()
    values = start(b)
    for _ in range(draw(st.integers(3, 14))):
        place = st.integers(0, len(values) - 1)
        try:
            if draw(st.booleans()):
                made = draw(st.sampled_from(UNARY))(b, values[draw(place)])
            else:
                pair = values[draw(place)], values[draw(place)]
                made = b.call(draw(st.sampled_from(BINARY)), *pair)
        except (RuntimeError, ValueError, IndexError, TypeError):
            b.graph.erase_node(next(iter(reversed(b.graph.nodes))))
            continue
        values.append(made)
    for node in list(b.graph.nodes):
        if node.op == "get_attr" and not node.users:
            b.graph.erase_node(node)
            del b.weights[str(node.target)]
    outputs = [node for node in values if not node.users and node.op == "call_function"]
    assume(outputs)
    return b.program(*outputs[:4])


def inputs(rows: int) -> list[torch.Tensor]:
    return [special_values(rows, 4, 4), special_values(rows, 4, 4, seed=1)]


TRIES = settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)


@pytest.mark.parametrize("pass_", PASSES, ids=lambda pass_: pass_.name)
@TRIES
@given(program=programs())
def test_same_bits_untouched_input_and_a_second_run_plans_nothing(pass_, program):
    checked = run_pass(pass_, program)
    for rows in (1, 2, 5):
        try:
            program(*inputs(rows))
        except RuntimeError:
            continue  # tracing took a size for granted that these inputs do not have
        check_numbers(pass_.exactness, program, checked.after, inputs(rows))


@TRIES
@given(program=programs())
def test_all_passes_in_turn_reach_a_fixpoint_with_the_same_bits(program):
    after, rounds = program, 0
    while True:
        before, rounds = after, rounds + 1
        for pass_ in PASSES:
            after = run_pass(pass_, after).after
        if after is before:
            break
    assert rounds < 8
    try:
        expected = program(*inputs(3))
    except RuntimeError:
        return
    assert all(map(is_same_bits, expected, after(*inputs(3))))
