"""A place in a graph where one op can stand for several nodes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor

from redpass.analysis.flow import concrete
from redpass.analysis.structure import Structure
from redpass.fake import fake_mode, fake_tensor
from redpass.plan import Insert, Ref, SetWeight, Skip, WeightRef
from redpass.program import Program


@dataclass(frozen=True)
class Site:
    """One place.

    Attributes:
        op: name of the `redpass::` op.
        results: nodes whose values the op's results are, in order; "" for one nobody reads.
        arguments: the op's arguments, all of them, `Ref` and `WeightRef` where nodes stand.
        before: the node the op is put before.
        covers: the nodes that it stands for, results among them.
        reason: what was found, in words.
        weights: weights that the op needs and the program has not.
        prepared: views of operands that stand before the op, in order.
    """

    op: str
    results: tuple[str, ...]
    arguments: tuple[Any, ...]
    before: str
    covers: frozenset[str]
    reason: str
    weights: tuple[SetWeight, ...] = ()
    prepared: tuple[Insert, ...] = ()

    @property
    def target(self) -> str:
        """The label of the place: its last result."""
        return self.results[-1]

    def values(self, program: Program, sizes: Mapping[str, int]) -> tuple[Any, ...]:
        """Returns the op's arguments as tensors on the meta device.

        Args:
            sizes: dimension name -> size; others are 2.
        """
        return self._values(program, lambda node: _meta(node, sizes), lambda t: t.to("meta"))

    def operand(self, program: Program, place: int) -> Any:
        """Returns what the argument at `place` is, with symbolic sizes."""

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            return tensor if isinstance(tensor, FakeTensor) else fake_tensor(mode, tensor)

        mode = fake_mode(program)
        with mode:
            return self._values(program, lambda node: node.meta["val"], keep)[place]

    def _values(
        self,
        program: Program,
        of_node: Callable[[fx.Node], Any],
        of_weight: Callable[[torch.Tensor], torch.Tensor],
    ) -> tuple[Any, ...]:
        fresh = {weight.name: weight.value for weight in self.weights}
        made: dict[str, Any] = {}

        def value(item: Any) -> Any:
            if isinstance(item, WeightRef):
                found = fresh.get(item.name)
                return of_weight(program.weights[item.name] if found is None else found)
            if isinstance(item, Ref):
                return made[item.name] if item.name in made else of_node(program.nodes[item.name])
            return item

        for step in self.prepared:
            made[step.name] = step.target(*map(value, step.args))
        return tuple(
            [value(part) for part in item] if isinstance(item, list) else value(item)
            for item in self.arguments
        )


def _meta(node: fx.Node, sizes: Mapping[str, int]) -> Any:
    held = node.meta["val"]
    known = dict(sizes)
    if not isinstance(held, torch.Tensor):
        return concrete(held, known, 2)
    shape, strides = ([concrete(n, known, 2) for n in part] for part in (held.shape, held.stride()))
    return torch.empty_strided(shape, strides, dtype=held.dtype, device="meta")


Finder = Callable[[Program, Structure], Iterator[Site | Skip]]
"""Finds the places of one op, in graph order, and says why what looks alike is none."""


def reader_outside(program: Program, inside: frozenset[str], results: tuple[str, ...]) -> str:
    """Returns a node of `inside`, no result, that a node outside reads, or ""."""
    for name in inside - set(results):
        if any(user.name not in inside for user in program.nodes[name].users):
            return name
    return ""
