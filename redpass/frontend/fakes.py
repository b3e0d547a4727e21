"""Fake values of a graph in core form, with symbols named as the dimensions are."""

from __future__ import annotations

import contextlib
import importlib
import re
from collections.abc import Iterator
from typing import Any

import sympy
import torch
from torch import SymInt, Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

from redpass.errors import TraceError
from redpass.fake import fake_call, fake_tensor
from redpass.frontend.dims import Dims, evaluate, is_fixed
from redpass.frontend.normalise import Core
from redpass.program import Port, Signature, output_node


def propagate(core: Core, dims: Dims, outputs: tuple[str, ...], notes: list[str]) -> Signature:
    """Gives every node of `core` its fake value and returns the signature.

    Args:
        core: a graph in core form and its weights; its nodes' `val` are overwritten.
        dims: the inputs, in order, and the names of their axes.
        outputs: the names of the outputs.
        notes: receives a sentence for each dimension that turns out to have one size.

    Raises:
        TraceError: an op that cannot be computed on symbolic sizes.
    """
    mode, symbols = symbolic_mode(dims)
    fixed = _fill(core, dims, mode, symbols)
    if fixed:
        # An op allows one size only; fake values that still hold the symbol would lie about it.
        notes += [
            f"dimension '{name}' is fixed to {dims.sizes[name]}{place}"
            for name, place in fixed.items()
        ]
        dims = dims.fix(fixed)
        _fill(core, dims, *symbolic_mode(dims))
    outputs = _keep_tensors(core.graph, outputs, notes)
    return _signature(core.graph, dims, outputs)


def _keep_tensors(graph: fx.Graph, names: tuple[str, ...], notes: list[str]) -> tuple[str, ...]:
    """Takes outputs that are sizes or numbers out of the graph. Returns the names of the rest."""
    out = output_node(graph)
    values: Any = out.args[0]
    pairs = list(zip(names, values, strict=True))
    kept = [
        (n, v) for n, v in pairs if isinstance(v, fx.Node) and isinstance(v.meta["val"], Tensor)
    ]
    notes += [f"output '{n}' is no tensor and was left out" for n, v in pairs if (n, v) not in kept]
    out.args = (tuple(value for _, value in kept),)
    return tuple(name for name, _ in kept)


def _fill(
    core: Core, dims: Dims, mode: FakeTensorMode, symbols: dict[str, SymInt]
) -> dict[str, str]:
    """Computes all fake values. Returns dimensions that turned out to have one size, and where."""
    fixed: dict[str, str] = {}
    inputs = iter(dims.example.items())
    for node in core.graph.nodes:
        if node.op == "placeholder":
            name, value = next(inputs)
            node.meta["val"] = _input(mode, value, dims.axes[name], symbols)
        elif node.op == "get_attr":
            node.meta["val"] = fake_tensor(mode, core.weights[str(node.target)])
        elif node.op == "call_function":
            node.meta["val"] = _call(mode, node)
            for name, symbol in symbols.items():
                if name not in fixed and is_fixed(symbol):
                    fixed[name] = user_line(node)
    return fixed


def user_line(node: fx.Node) -> str:
    """Returns ` at file:line` of the model's code a node comes from, or ''."""
    found = re.findall(r'File "([^"]+)", line (\d+)', node.meta.get("stack_trace") or "")
    return f" at {found[-1][0]}:{found[-1][1]}" if found else ""


def symbolic_mode(dims: Dims) -> tuple[FakeTensorMode, dict[str, SymInt]]:
    """Returns a fake mode and one symbol for each named dimension."""
    environment = ShapeEnv()
    mode = FakeTensorMode(shape_env=environment, allow_non_fake_inputs=True)
    symbols = {name: _symbol(environment, name, size) for name, size in dims.sizes.items()}
    return mode, symbols


def _symbol(environment: ShapeEnv, name: str, size: int) -> SymInt:
    from torch._dynamo.source import ConstantSource  # half a second that a refused file saves

    source = ConstantSource(name)
    with _named(name):
        symbol = environment.create_symbol(size, source, DimDynamic.DYNAMIC)
    created: Any = environment.create_symintnode(symbol, hint=size, source=source)
    return created  # type: ignore[no-any-return]


@contextlib.contextmanager
def _named(name: str) -> Iterator[None]:
    """Lets the next symbol be called `name` instead of `s7`."""
    symbolic_shapes: Any = importlib.import_module("torch.fx.experimental.symbolic_shapes")
    original = symbolic_shapes.make_symbol

    def make(_kind: Any, _number: Any, **assumptions: Any) -> sympy.Symbol:
        return sympy.Symbol(name, **assumptions)

    symbolic_shapes.make_symbol = make
    try:
        yield
    finally:
        symbolic_shapes.make_symbol = original


def _input(
    mode: FakeTensorMode, value: Tensor, axes: tuple[str | int, ...], symbols: dict[str, SymInt]
) -> Tensor:
    shape = [evaluate(axis, symbols) for axis in axes]
    device = "cpu" if value.is_meta else value.device
    with mode:
        return torch.empty(shape, dtype=value.dtype, device=device)


def _call(mode: FakeTensorMode, node: fx.Node) -> Any:
    try:
        return fake_call(mode, node)
    except Exception as error:
        first = str(error).strip().splitlines() or [type(error).__name__]
        raise TraceError(
            f"{node.target} cannot be computed on symbolic sizes: {first[0]}",
            place=node.name,
            hint="trace with fixed sizes: give numbers in --input 'name:dtype[sizes]'",
        ) from error


def _signature(graph: fx.Graph, dims: Dims, names: tuple[str, ...]) -> Signature:
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    values: Any = output_node(graph).args[0]
    return Signature(
        inputs=tuple(map(_port, dims.example, inputs)),
        outputs=tuple(map(_port, names, values)),
        dims=dict(dims.ranges),
    )


def _port(name: str, node: fx.Node) -> Port:
    value = node.meta["val"]
    shape = tuple(size if isinstance(size, int) else str(size) for size in value.shape)
    return Port(name, value.dtype, shape)
