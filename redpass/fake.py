"""Fake values: what every node carries in place of numbers, and what changes when sizes do."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensorMode

from redpass import ops
from redpass.errors import PassError
from redpass.program import Program

FIXES_PRODUCTS = tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13)
"""Whether torch fixes symbolic sizes of products of batches (2.11 does)."""


def fake_mode(program: Program) -> FakeTensorMode:
    """Returns the mode the program's fake values belong to."""
    for node in program.graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, torch._subclasses.FakeTensor):
            return value.fake_mode
    return FakeTensorMode(allow_non_fake_inputs=True)


def fake_tensor(mode: FakeTensorMode, tensor: Tensor) -> Tensor:
    """Returns a fake tensor with the shape, dtype and strides of `tensor`, on the CPU."""
    with mode:
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)


def limited(
    mode: FakeTensorMode, like: Tensor, axis: int, most: int, sizes: Mapping[int, int]
) -> Tensor:
    """Returns a fake value like another one, with at most `most` entries along one axis.

    Args:
        sizes: axis -> its new constant size.
    """
    shape = [sizes.get(place, size) for place, size in enumerate(like.shape)]
    with mode:
        shape[axis] = torch.sym_min(most, shape[axis])
        return torch.empty(shape, dtype=like.dtype, device=like.device)


def fake_call(
    mode: FakeTensorMode, node: fx.Node, instead: Mapping[fx.Node, Any] | None = None
) -> Any:
    """Returns what calling `node` gives on fake values. Raises whatever the op raises.

    Args:
        instead: values to take in place of the ones the operands carry.
    """
    known = instead or {}
    args = fx.node.map_arg(node.args, lambda n: known[n] if n in known else n.meta["val"])
    kwargs = fx.node.map_arg(node.kwargs, lambda n: known[n] if n in known else n.meta["val"])
    # A few kernels refuse symbolic sizes, or guard on them; their decompositions take them. For
    # those that are known to, nothing else is tried: torch logs the failure at length.
    if not _needs_decomposition(node, args):
        with contextlib.suppress(RuntimeError), mode:
            return node.target(*args, **kwargs)  # type: ignore[operator]
    with enable_python_dispatcher(), mode:
        return node.target(*args, **kwargs)  # type: ignore[operator]


def _needs_decomposition(node: fx.Node, values: tuple[Any, ...]) -> bool:
    """Whether the op itself would not take symbolic sizes, or would fix them.

    Attention whose values have other heads or another width than its keys fixes them before
    torch 2.13; functions of redpass may call it.
    """
    if ops.is_call(node, "scaled_dot_product_attention"):
        key, value = values[1].shape, values[2].shape
        return bool(key[-1] != value[-1] or (len(key) == 4 and key[1] != value[1]))
    if ops.is_call(node, "matmul"):
        return FIXES_PRODUCTS
    return ops.is_call(node, "baddbmm") or isinstance(node.target, FunctionType)


def is_same_size(left: Any, right: Any) -> bool:
    """Whether two fake values have the same form: dtype and sizes, symbols compared by name."""
    if isinstance(left, Tensor) and isinstance(right, Tensor):
        return left.dtype == right.dtype and list(map(str, left.shape)) == list(
            map(str, right.shape)
        )
    if isinstance(left, (tuple, list)) and isinstance(right, (tuple, list)):
        return len(left) == len(right) and all(map(is_same_size, left, right))
    return type(left) is type(right) and str(left) == str(right)


@dataclass
class Sizes:
    """Keeps the fake values of a graph true while nodes are given new arguments.

    Attributes:
        changed: nodes whose own call, or whose size, is another one than before.
    """

    mode: FakeTensorMode
    changed: set[fx.Node] = field(default_factory=set)

    def give(self, node: fx.Node) -> None:
        """Gives a new node its value.

        While sizes are changing its operands' values may be old ones, and calls that fail are
        logged by torch at length: all but sizes read off inputs are left to `propagate`.
        """
        reads_input = any(operand.op == "placeholder" for operand in node.all_input_nodes)
        if self.changed and not (reads_input and ops.is_call(node, "sym_size")):
            self.changed.add(node)
        else:
            node.meta["val"] = fake_call(self.mode, node)

    def resize(self, source: fx.Node, axis: int, size: int) -> None:
        """Gives an input another size on one axis."""
        old = source.meta["val"]
        shape = [*old.shape]
        shape[axis] = size
        with self.mode:
            source.meta["val"] = torch.empty(shape, dtype=old.dtype, device=old.device)
        self.changed.add(source)

    def limit(
        self, like: fx.Node, node: fx.Node, axis: int, most: int, sizes: Mapping[int, int]
    ) -> None:
        """Gives an input the value of another one, with other sizes and at most `most` entries."""
        node.meta["val"] = limited(self.mode, like.meta["val"], axis, most, sizes)

    def propagate(self, graph: fx.Graph) -> None:
        """Computes the values again behind every change, as far as sizes differ.

        Raises:
            PassError: a node that does not take its operands' sizes; it is named.
        """
        if not self.changed:
            return
        moved: set[fx.Node] = set()
        for node in graph.nodes:
            is_read = any(operand in moved for operand in node.all_input_nodes)
            if node.op == "call_function" and (node in self.changed or is_read):
                old = node.meta.get("val")
                node.meta = {**node.meta, "val": self._call(node)}
                if ops.layout_of(old) != ops.layout(node):
                    moved.add(node)
            elif node in self.changed:
                moved.add(node)

    def _call(self, node: fx.Node) -> Any:
        try:
            return fake_call(self.mode, node)
        except Exception as error:
            if node.target is torch.ops.aten.view.default:
                # Elements may lie in another order than before: what is no view is a copy.
                node.target = torch.ops.aten.reshape.default
                return self._call(node)
            found = str(error).partition("\n")[0]
            raise PassError(f"the new sizes do not fit: {found}", place=node.name) from error
