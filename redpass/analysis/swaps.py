"""`swaps`: what would come of running one layer's weights in another layer's place.

For a layer `j` and a neighbour `i` of the same form, the neighbour is run on what `j` reads, and
compared with what `j` gives: `1 - E cos(f_j(x_j), f_i(x_j))` over calibration tokens. So layers
are alike when they do alike, however different their weights look (a permuted layer is equal).
Beside it stands `1 - E cos(x_j, f_j(x_j))`, what dropping the layer would do.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from redpass.analysis.blocks import Block, blocks, is_removable
from redpass.analysis.tokens import Tokens
from redpass.analysis.twins import Twin, match
from redpass.errors import DataError
from redpass.facts import Facts
from redpass.partial import Part
from redpass.program import Program
from redpass.verify.inputs import complete

FEW = 8
"""Calibration batches that are run."""


@dataclass(frozen=True)
class Swap:
    """One layer, and the neighbour whose weights it could run with.

    Attributes:
        layer: label of the layer; `by` that of the neighbour.
        twin: where the layer's weights stand in the neighbour, or why they do not.
        effect: `1 - cos` to what the layer gives, NaN when not measured.
        dropped: the same for dropping the layer.
    """

    layer: str
    by: str
    twin: Twin
    effect: float = float("nan")
    dropped: float = float("nan")


def pairs(program: Program, facts: Facts) -> Mapping[str, Swap]:
    """Returns every layer with each neighbour on its stream, unmeasured: `layers.4=layers.3`."""
    found = {}
    for one, other in _neighbours(facts.get(blocks)):
        twin = match(program, (one.entry, one.after), (other.entry, other.after))
        if not is_removable(program, one):
            twin = Twin(fault="the stream before it and the one behind it are not of one kind")
        found[f"{one.label}={other.label}"] = Swap(one.label, other.label, twin)
    return found


def _neighbours(layers: tuple[Block, ...]) -> Iterator[tuple[Block, Block]]:
    for one, other in itertools.pairwise(layers):
        if one.stream == other.stream:
            yield other, one
            yield one, other


def swaps(program: Program, facts: Facts) -> Mapping[str, Swap]:
    """Measures every pair that can be swapped; the others keep NaN.

    Raises:
        DataError: no calibration data, or a layer whose values are NaN or infinite (named).
    """
    unmeasured = facts.get(pairs)
    found = facts.recall("swaps", lambda: _measure(program, facts, unmeasured))
    return {
        key: Swap(swap.layer, swap.by, swap.twin, *found[key]) if key in found else swap
        for key, swap in unmeasured.items()
    }


def _measure(
    program: Program, facts: Facts, unmeasured: Mapping[str, Swap]
) -> dict[str, tuple[float, ...]]:
    layers = {block.label: block for block in facts.get(blocks)}
    wanted = {key: swap for key, swap in unmeasured.items() if not swap.twin.fault}
    runs = {key: _part(program, layers[swap.by]) for key, swap in wanted.items()}
    sums = {key: torch.zeros(3, dtype=torch.float64) for key in wanted}
    tokens = Tokens(program)
    for batch in facts.data()[:FEW]:
        inputs = complete(program, batch)
        known = _known(program, inputs, runs.values(), layers.values())
        for key, swap in wanted.items():
            mine, other = layers[swap.layer], layers[swap.by]
            made = runs[key].run({**known, other.entry: known[mine.entry]})[other.after]
            rows = [
                tokens.rows(mine.after, value, inputs).double()
                for value in (known[mine.after], made, known[mine.entry])
            ]
            sums[key] += _cosines(rows, swap.layer)
    return {key: tuple((1 - total[:2] / total[2]).tolist()) for key, total in sums.items()}


def _part(program: Program, block: Block) -> Part:
    """The layer's own nodes: all that its result needs of what depends on the stream before it."""
    inside = _behind(program, block)
    outside = [name for name in program.nodes if name not in inside]
    return Part(program, [block.after], outside)


def _behind(program: Program, block: Block) -> set[str]:
    """Nodes that depend on the block's entry, up to its result."""
    found, reached = set(), {block.entry}
    for node in program.graph.nodes:
        if any(operand.name in reached for operand in node.all_input_nodes):
            reached.add(node.name)
            found.add(node.name)
        if node.name == block.after:
            break
    return found


def _known(
    program: Program,
    inputs: Mapping[str, Tensor],
    runs: Iterable[Part],
    layers: Iterable[Block],
) -> dict[str, Any]:
    """All values of one run of the program that the layers' runs start from."""
    names = [port.name for port in program.signature.inputs]
    start = {node.name: inputs[n] for node, n in zip(program.inputs, names, strict=True)}
    wanted: set[str] = set().union(*(run.needs for run in runs))
    for layer in layers:
        wanted |= {layer.entry, layer.after}
    return start | Part(program, sorted(wanted), start.keys()).run(start)


def _cosines(rows: list[Tensor], layer: str) -> Tensor:
    if not all(bool(torch.isfinite(part).all()) for part in rows):
        raise DataError("its values on the calibration data are NaN or infinite", place=layer)
    target, made, before = rows
    cosines = (torch.cosine_similarity(target, other, dim=-1).sum() for other in (made, before))
    return torch.stack([*cosines, torch.tensor(len(target), dtype=torch.float64)])
