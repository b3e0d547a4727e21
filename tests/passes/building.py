"""Builds small programs node by node, so that a test states exactly the graph it is about.

b = Builder()
x = b.input("x", "batch", 8)
w = b.weight("w", torch.randn(8, 8))
program = b.program(b.call(aten.linear.default, x, w))
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from redpass.fake import fake_call, fake_tensor
from redpass.frontend import fakes
from redpass.frontend.dims import evaluate
from redpass.program import Origin, Port, Program, Signature

aten = torch.ops.aten
SIZES = {"batch": 3, "seq": 11, "past": 5, "width": 13}
"""An example size of each dimension name."""


class Builder:
    """A graph under construction: `input`, `weight` and `call` return nodes, `program` ends it."""

    def __init__(self) -> None:
        self.graph = fx.Graph()
        environment = ShapeEnv()
        self.mode = FakeTensorMode(shape_env=environment, allow_non_fake_inputs=True)
        self.symbols = {name: fakes._symbol(environment, name, n) for name, n in SIZES.items()}
        self.weights: dict[str, Tensor] = {}
        self.ports: list[Port] = []

    def input(self, name: str, *shape: int | str, dtype: torch.dtype = torch.float32) -> fx.Node:
        """Adds an input; strings in `shape` are expressions over the names in `SIZES`."""
        node = self.graph.placeholder(name.replace(".", "_"))
        with self.mode:
            sizes = [evaluate(size, self.symbols) for size in shape]
            node.meta["val"] = torch.empty(sizes, dtype=dtype)
        self.ports.append(Port(name, dtype, shape))
        return node

    def weight(self, name: str, value: Tensor) -> fx.Node:
        """Adds a weight and the node that reads it."""
        self.weights[name] = value
        node = self.graph.create_node("get_attr", name, name=name.replace(".", "_"))
        node.meta["val"] = fake_tensor(self.mode, value)
        return node

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """Adds a call, with its fake value."""
        node = self.graph.call_function(target, args, kwargs)
        node.meta["val"] = fake_call(self.mode, node)
        return node

    def program(self, *outputs: fx.Node, state: tuple[tuple[str, str], ...] = ()) -> Program:
        """Ends the graph; outputs are called `out0`, `out1`, ..., or as `state` says."""
        node = self.graph.output(outputs)
        node.meta["val"] = tuple(output.meta["val"] for output in outputs)
        paired = [name for _, name in state]
        names = [f"out{i}" for i in range(len(outputs) - len(paired))] + paired
        ports = [
            Port(name, output.meta["val"].dtype, tuple(_size(s) for s in output.meta["val"].shape))
            for name, output in zip(names, outputs, strict=True)
        ]
        dims = {name: (1, None) for name in SIZES if any(name in str(p) for p in self.ports)}
        signature = Signature(tuple(self.ports), tuple(ports), state, dims)
        return Program(self.graph, self.weights, signature, Origin("module", "built by a test"))


def _size(size: int | torch.SymInt) -> int | str:
    return size if isinstance(size, int) else str(size)


def special_values(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Returns random values with -0.0, 0.0, NaN and infinities among them."""
    generator = torch.Generator().manual_seed(seed)
    value = torch.randn(shape, generator=generator).to(dtype)
    specials = torch.tensor([-0.0, 0.0, float("nan"), float("inf"), -float("inf"), 1.0])
    flat = value.view(-1)
    where = torch.randperm(flat.numel(), generator=generator)[: len(specials)]
    flat[where] = specials[: len(where)].to(dtype)
    return value
