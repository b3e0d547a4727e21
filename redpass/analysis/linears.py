"""The linears of a program in one form, whichever op computes them, and who shares a weight.

`linear`, `mm`, `addmm` and `matmul` with a weight as matrix all mean `x Wᵀ + b`. Passes that fold
or merge linears read and write `W` as `[out, in]` and leave the op as it was traced.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode

from redpass import ops
from redpass.facts import Facts
from redpass.fake import fake_call
from redpass.plan import Edit, Insert, Ref, SetArgument, SetWeight, WeightRef
from redpass.program import Program

aten = torch.ops.aten


@dataclass(frozen=True)
class Linear:
    """One linear layer.

    Attributes:
        node: the node that computes it.
        input: the node it reads, `[..., ins]`.
        weight: name of the weight.
        bias: name of the bias `[outs]`, or None.
        transposed: whether the weight is stored as `[ins, outs]`.
        ins: width of the input.
        outs: width of the output.
    """

    node: str
    input: str
    weight: str
    bias: str | None
    transposed: bool
    ins: int
    outs: int

    @property
    def names(self) -> tuple[str, ...]:
        """The weights it reads: matrix, then bias if there is one."""
        return (self.weight, self.bias) if self.bias else (self.weight,)

    def matrix(self, program: Program) -> Tensor:
        """Returns the matrix as `[outs, ins]`: a view of the weight."""
        stored = program.weights[self.weight]
        return stored.t() if self.transposed else stored

    def offset(self, program: Program) -> Tensor | None:
        """Returns the bias `[outs]`, or None."""
        return program.weights[self.bias] if self.bias else None

    def store(self, name: str, matrix: Tensor, source: str) -> SetWeight:
        """Returns the edit that keeps `matrix` `[outs, ins]` as this linear would store it."""
        return SetWeight(name, (matrix.t() if self.transposed else matrix).contiguous(), source)

    def swap(self, program: Program, old: str, new: str) -> list[Edit]:
        """Returns the edits that let this linear read the weight `new` in place of `old`."""
        return [
            SetArgument(self.node, operand.name, WeightRef(new))
            for operand in program.nodes[self.node].all_input_nodes
            if operand.op == "get_attr" and str(operand.target) == old
        ]

    def call(self, name: str, value: str, weight: str, bias: str | None, before: str) -> Insert:
        """Returns the edit that computes this linear with other weights on the node `value`."""
        x, w = Ref(value), WeightRef(weight)
        b = WeightRef(bias) if bias else None
        if not self.transposed:
            return Insert(name, aten.linear.default, (x, w, b), before)
        if b is None:
            return Insert(name, aten.matmul.default, (x, w), before)
        return Insert(name, aten.addmm.default, (b, x, w), before)


@dataclass(frozen=True)
class Linears:
    """All linears of a program.

    Attributes:
        by_node: node name -> linear, in graph order.
        readers: weight name -> how many nodes read that tensor, under any of its names.
    """

    by_node: Mapping[str, Linear]
    readers: Mapping[str, int]

    @cached_property
    def by_input(self) -> Mapping[str, tuple[Linear, ...]]:
        """Node name -> the linears that read it, in graph order."""
        found: dict[str, list[Linear]] = {}
        for linear in self.by_node.values():
            found.setdefault(linear.input, []).append(linear)
        return {name: tuple(items) for name, items in found.items()}

    def shared(self, names: Iterable[str]) -> str | None:
        """Returns the first of the weights that more than one node reads, or None."""
        return next((name for name in names if self.readers[name] > 1), None)


def linears(program: Program, facts: Facts | None = None) -> Linears:
    """Finds every linear of `program` whose matrix and bias are weights."""
    del facts
    found = (_read(node) for node in program.graph.nodes)
    return Linears({item.node: item for item in found if item}, count_readers(program))


def count_readers(program: Program) -> dict[str, int]:
    """Returns weight name -> how many nodes read that tensor, under any of its names."""
    total: dict[Any, int] = {}
    for node in program.weight_nodes:
        key = identity(program.weights[str(node.target)])
        total[key] = total.get(key, 0) + len(node.users)
    return {name: total.get(identity(tensor), 0) for name, tensor in program.weights.items()}


def identity(tensor: Tensor) -> tuple[Any, ...]:
    """Returns what two names of one tensor have in common: storage, place in it, sizes, strides."""
    storage = tensor.untyped_storage()._cdata
    return storage, tensor.storage_offset(), tuple(tensor.shape), tuple(tensor.stride())


def _read(node: fx.Node) -> Linear | None:
    if ops.is_call(node, "linear"):
        x, weight, bias = (ops.argument(node, name) for name in ("input", "weight", "bias"))
        return _linear(node, x, weight, bias, transposed=False)
    if ops.is_call(node, "mm", "matmul") and len(node.args) == 2:
        return _linear(node, node.args[0], node.args[1], None, transposed=True)
    if ops.is_call(node, "addmm") and not node.kwargs and len(node.args) == 3:
        bias, x, weight = node.args
        return _linear(node, x, weight, bias, transposed=True)
    return None


def _linear(node: fx.Node, x: Any, weight: Any, bias: Any, *, transposed: bool) -> Linear | None:
    if not _is_weight(weight, 2) or not (bias is None or _is_weight(bias, 1)):
        return None
    ins, outs = (int(size) for size in weight.meta["val"].shape)
    if not transposed:
        ins, outs = outs, ins
    if bias is not None and bias.meta["val"].shape[0] != outs:
        return None
    name = None if bias is None else str(bias.target)
    return Linear(node.name, x.name, str(weight.target), name, transposed, ins, outs)


def _is_weight(node: Any, rank: int) -> bool:
    if not isinstance(node, fx.Node) or node.op != "get_attr":
        return False
    value = node.meta["val"]
    return value.dim() == rank and bool(value.is_floating_point())


def new_name(program: Program, old: str, what: str) -> str:
    """Returns a name no weight of `program` has: `old_what`, numbered when it is taken."""
    name, number = f"{old}_{what}", 2
    while name in program.weights:
        name, number = f"{old}_{what}_{number}", number + 1
    return name


def can_view(mode: FakeTensorMode, node: fx.Node, value: Tensor) -> bool:
    """Whether the views that follow `node` can be taken of the fake `value` in its place.

    A `view` fails where strides do not allow it; every other op takes any strides.
    """
    if _only_splits(node):
        return True
    for user in node.users:
        if not ops.is_view(user):
            continue
        try:
            viewed = fake_call(mode, user, {node: value})
        except (RuntimeError, ValueError):
            return False
        # A list of pieces (`chunk`) has readers of its own, which are not followed here.
        if not isinstance(viewed, Tensor) or not can_view(mode, user, viewed):
            return False
    return True


def _only_splits(node: fx.Node) -> bool:
    """Whether the views that follow split the last axis or move axes: that any strides allow.

    Told from sizes, because calls on fake values take milliseconds each.
    """
    for user in node.users:
        if ops.is_view(user):
            if not isinstance(user.meta["val"], Tensor):
                return False
            lead = list(map(str, node.meta["val"].shape[:-1]))
            same = list(map(str, user.meta["val"].shape[: len(lead)])) == lead
            moves = ops.is_call(user, *ops.RESHAPES, *ops.COPYING_VIEWS) and not same
            if moves or not _only_splits(user):
                return False
    return True


def opaque(program: Program, table: Linears) -> Iterator[tuple[str, str]]:
    """Yields the linears, grouped or foreign ones too, whose weight is no plain matrix, and why."""
    for node in program.graph.nodes:
        foreign = ops.namespace(node) != "aten" and "linear" in ops.base_name(node)
        if (foreign or ops.is_call(node, "linear")) and node.name not in table.by_node:
            yield node.name, "its weight is computed, quantised or of more than two dimensions"
