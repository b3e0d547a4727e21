"""Folds a linear into the linear that reads it.

h = linear(x, W1, b1)
y = linear(h, W2, b2)    ->    y = linear(x, W2 W1, W2 b1 + b2)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor

from redpass.analysis.linears import Linear, Linears, linears, new_name
from redpass.facts import Facts
from redpass.plan import Action, Edit, Exactness, Plan, Replace, SetWeight, Skip
from redpass.program import Program

RULE = "fold_linear_chains.product"

Chain = tuple[Linear, ...]


@dataclass(frozen=True)
class FoldLinearChains:
    """Replaces linears in a row, with nothing between, by their product.

    What: chains of any length; a fold happens only where the product has no more weights, and so
    no more FLOPs, than the two it replaces.
    When: nothing else reads the value between or the weights. Products are computed in float64 and
    rounded once.
    Not tried: linears with a view or an activation between; low-rank pairs, whose narrow inner
    width is what saves, stay.
    Costs: one float64 matrix product per fold.
    """

    name: ClassVar[str] = "fold_linear_chains"
    needs: ClassVar[tuple[Any, ...]] = (linears,)
    exactness: ClassVar[Exactness] = Exactness.WITHIN_TOLERANCE

    def plan(self, program: Program, facts: Facts) -> Plan:
        """Plans one action per run of linears that become one."""
        return Plan.of(_judge_all(facts.get(linears), program))


def _judge_all(table: Linears, program: Program) -> Iterator[Action | Skip]:
    follower: dict[Linear, Linear] = {}
    for second in table.by_node.values():
        first = table.by_node.get(second.input)
        if first is None:
            continue
        if reason := _why_not(first, second, table, program):
            yield Skip(RULE, second.node, reason)
        else:
            follower[first] = second
    for head in follower:
        if head not in follower.values():
            yield from _fold_run(_run(head, follower), program)


def _why_not(first: Linear, second: Linear, table: Linears, program: Program) -> str | None:
    if len(program.nodes[first.node].users) > 1:
        return "the value between is read elsewhere too"
    if name := table.shared(first.names + second.names):
        return f"{name} is read elsewhere too, so the product would add bytes"
    return None


def _run(head: Linear, follower: dict[Linear, Linear]) -> Chain:
    found = [head]
    while found[-1] in follower:
        found.append(follower[found[-1]])
    return tuple(found)


def _fold_run(run: Chain, program: Program) -> Iterator[Action | Skip]:
    """Folds neighbours until no fold is left that does not grow, so a second run finds none."""
    pieces: list[Chain] = [(linear,) for linear in run]
    place = 0
    while place + 1 < len(pieces):
        if _growth(pieces[place], pieces[place + 1]) > 0:
            place += 1
        else:
            pieces[place : place + 2] = [pieces[place] + pieces[place + 1]]
            place = max(place - 1, 0)
    yield from (_fold(piece, program) for piece in pieces if len(piece) > 1)
    for first, second in pairwise(pieces):
        inner, grown = first[-1].outs, _growth(first, second)
        reason = f"a low-rank pair of inner width {inner}: the product has {grown} weights more"
        yield Skip(RULE, second[-1].node, reason)


def _growth(first: Chain, second: Chain) -> int:
    """How many weights the product has more than the two matrices."""
    ins, inner, outs = first[0].ins, first[-1].outs, second[-1].outs
    return ins * outs - inner * (ins + outs)


def _fold(chain: Chain, program: Program) -> Action:
    first, last = chain[0], chain[-1]
    matrix, offset = _product(chain, program)
    dtype = program.weights[last.weight].dtype
    weight = new_name(program, last.weight, "folded")
    source = " after ".join(linear.weight for linear in reversed(chain))
    edits: list[Edit] = [last.store(weight, matrix.to(dtype), source)]
    bias = None
    if offset is not None:
        bias = f"{weight}_bias"
        edits.append(SetWeight(bias, offset.to(dtype), source))
    node = f"{last.node}_folded"
    edits += [last.call(node, first.input, weight, bias, last.node), Replace(last.node, node)]
    before = sum(program.weights[name].numel() for linear in chain for name in linear.names)
    after = matrix.numel() + (0 if offset is None else offset.numel())
    return Action(
        RULE,
        last.node,
        tuple(edits),
        f"nothing stands between {' and '.join(linear.node for linear in chain)}",
        {"linears": len(chain)},
        {"parameters": before - after, "bytes": (before - after) * dtype.itemsize},
    )


def _product(chain: Chain, program: Program) -> tuple[Tensor, Tensor | None]:
    """Returns matrix and offset of the chain in float64."""
    matrix = chain[0].matrix(program).double()
    offset = chain[0].offset(program)
    total = None if offset is None else offset.double()
    for linear in chain[1:]:
        step, offset = linear.matrix(program).double(), linear.offset(program)
        matrix, total = step @ matrix, None if total is None else torch.mv(step, total)
        if offset is not None:
            total = offset.double() if total is None else total + offset
    return matrix, total
