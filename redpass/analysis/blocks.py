"""`blocks`: the layers of a program as parts of its residual stream, with names."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from redpass.analysis.structure import Branch, structure
from redpass.program import Program

if TYPE_CHECKING:
    from redpass.facts import Facts


@dataclass(frozen=True)
class Block:
    """One layer, or several that follow one another on one residual stream.

    Attributes:
        label: `layers.3`, or `layers.3-5` for several.
        branches: all their branches, in order.
        place: index of the first layer in the program; `stream` is the stream it is on.
        equal_to: index of the first layer with the same graph up to weights, for one layer.
    """

    label: str
    branches: tuple[Branch, ...]
    place: int
    stream: int
    equal_to: int = -1

    @property
    def entry(self) -> str:
        """The stream's value before it."""
        return self.branches[0].entry

    @property
    def after(self) -> str:
        """The stream's value after it."""
        return self.branches[-1].after


def blocks(program: Program, facts: Facts | None = None) -> tuple[Block, ...]:
    """Returns every layer of each stream that has at least two of them, in order."""
    found = structure(program) if facts is None else facts.get(structure)
    branches = {branch.label: branch for branch in found.branches}
    layers = [
        Block(
            _layer_label(branches[layer.branches[0]]),
            tuple(branches[label] for label in layer.branches),
            layer.index,
            layer.stream,
            layer.equal_to,
        )
        for layer in found.layers
    ]
    count = {block.stream: 0 for block in layers}
    for block in layers:
        count[block.stream] += 1
    return tuple(block for block in layers if count[block.stream] > 1)


def _layer_label(branch: Branch) -> str:
    return branch.label[: branch.label.rindex(f".{branch.kind}")]


def is_removable(program: Program, block: Block) -> bool:
    """Whether the stream may go past the block: one value in, one of the same kind out."""
    before, after = (program.nodes[name].meta["val"] for name in (block.entry, block.after))
    return before.dtype == after.dtype and before.shape == after.shape and _is_chain(block.branches)


def _is_chain(branches: Sequence[Branch]) -> bool:
    pairs = itertools.pairwise(branches)
    return all(b.entry in (a.after, a.entry) for a, b in pairs)
