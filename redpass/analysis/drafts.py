"""Edits under construction: new nodes with their fake values, checked while they are planned."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from redpass.analysis.heads.axes import Unfit
from redpass.analysis.linears import new_name
from redpass.fake import fake_mode, fake_tensor, limited
from redpass.plan import Edit, Insert, Ref, SetWeight, WeightRef
from redpass.program import Program

END = 2**63 - 1
"""The end of a slice that goes on to the last place."""

Sizing = Mapping[int, int]
"""Axis -> its new constant size."""


class Draft:
    """The edits of one action, in order.

    Args:
        program: what is edited.
        stem: what the names of new nodes begin with.
        before: the node that new ones are put before; may be changed on the way.

    Attributes:
        edits: what was put down so far.
    """

    def __init__(self, program: Program, stem: str, before: fx.Node) -> None:
        self.program, self.stem, self.before = program, stem, before
        self.edits: list[Edit] = []
        self._mode = fake_mode(program)
        self._values: dict[str, Any] = {}
        self._weights: dict[str, Tensor] = {}

    def call(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> Ref:
        """Puts down a node. Raises `Unfit` when its operands do not fit together."""
        return self.put(f"{self.stem}_{len(self._values)}", target, *args, **kwargs)

    def put(self, name: str, target: Callable[..., Any], *args: Any, **kwargs: Any) -> Ref:
        """Puts down a node under a name that other actions know, too. Raises as `call`."""
        try:
            with self._mode:
                value = target(*self._fake(args), **self._fake(kwargs))
        except Exception as error:
            found = str(error).partition("\n")[0]
            raise Unfit(f"what would stand in its place does not fit: {found}") from error
        self._values[name] = value
        self.edits.append(Insert(name, target, args, self.before.name, kwargs))
        return Ref(name)

    def weight(self, old: str, what: str, value: Tensor) -> WeightRef:
        """Puts down a weight made from the weight `old`."""
        name, number = new_name(self.program, old, what), 2
        while name in self._weights:
            name, number = new_name(self.program, old, f"{what}_{number}"), number + 1
        value = value.contiguous()
        self.edits.append(SetWeight(name, value, f"{old}, {what}"))
        self._weights[name] = fake_tensor(self._mode, value)
        return WeightRef(name)

    def stand_in(self, node: fx.Node, axis_sizes: Sizing) -> Ref:
        """Returns a reference to an input that other edits of the action give other sizes."""
        old = node.meta["val"]
        shape = [axis_sizes.get(axis, size) for axis, size in enumerate(old.shape)]
        with self._mode:
            self._values[node.name] = torch.empty(shape, dtype=old.dtype)
        return Ref(node.name)

    def limited(self, name: str, node: fx.Node, axis: int, most: int, sizes: Sizing) -> Ref:
        """Returns a reference to an input that an `AddState` puts beside the input `node`."""
        self._values[name] = limited(self._mode, node.meta["val"], axis, most, sizes)
        return Ref(name)

    def shape(self, ref: Ref) -> torch.Size:
        """Returns the sizes of a node's value, new or old."""
        shape: torch.Size = self._fake(ref).shape
        return shape

    def _fake(self, item: Any) -> Any:
        def value(leaf: Any) -> Any:
            if isinstance(leaf, Ref):
                known = self._values.get(leaf.name)
                return self.program.nodes[leaf.name].meta["val"] if known is None else known
            if isinstance(leaf, WeightRef):
                known = self._weights.get(leaf.name)
                if known is None:
                    known = fake_tensor(self._mode, self.program.weights[leaf.name])
                return known
            return leaf

        return fx.node.map_aggregate(item, value)
