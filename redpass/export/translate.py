"""Turns a program into an ONNX model, one node at a time, then tidies the graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx_ir as ir
import sympy
from torch import fx

from redpass import ops
from redpass.export import attention, experts, layers, layout, picks, pointwise, reductions
from redpass.export.emitter import Emitter
from redpass.export.rotary import rotary
from redpass.export.sizes import UntranslatedError, shape_of, type_of
from redpass.program import Port, Program

Translation = Callable[[Emitter, fx.Node], Any]

TABLE: dict[str, Translation] = {
    name: translation
    for part in (pointwise, reductions, layout, picks, layers, attention, experts)
    for name, translation in part.TABLE.items()
}
"""ATen base name -> translation. An op that is not here goes through torch's own exporter."""

IR_VERSION = 10


def translate(program: Program, opset: int) -> ir.Model:
    """Returns an ONNX model of `program`.

    Raises:
        UntranslatedError: an op, or a use of one, that has no translation here; names the node.
    """
    emitter = Emitter(program, opset)
    for port, node in zip(program.signature.inputs, program.inputs, strict=True):
        _input(emitter, port, node)
    for node in program.graph.nodes:
        if node.op == "call_function" and not ops.is_size(node) and _is_computation(node):
            emitter.values[node] = _one(emitter, node)
    for node in program.outputs:
        _output(emitter, node)
    return ir.Model(emitter.graph, ir_version=IR_VERSION, producer_name="redpass")


def _is_computation(node: fx.Node) -> bool:
    return not ops.base_name(node).startswith(("_assert", "sym_constrain", "_check"))


def _one(emitter: Emitter, node: fx.Node) -> Any:
    found = rotary(emitter, node)
    if found is None:
        name, space = ops.base_name(node), ops.namespace(node)
        name = name if space in ("aten", "") else f"{space}::{name}"
        if name not in TABLE:
            raise UntranslatedError(f"'{name}' at '{node.name}'")
        found = TABLE[name](emitter, node)
    if isinstance(found, ir.Value):
        emitter.shapes.setdefault(found, shape_of(node))
    return found


def _input(emitter: Emitter, port: Port, node: fx.Node) -> None:
    value = ir.Value(
        name=port.name, type=ir.TensorType(type_of(port.dtype)), shape=ir.Shape(port.shape)
    )
    emitter.graph.inputs.append(value)
    emitter.values[node] = value
    emitter.shapes[value] = shape_of(node)
    for axis, size in enumerate(shape_of(node)):
        if isinstance(size, sympy.Symbol):
            emitter.sources.setdefault(size, (value, axis))


def _output(emitter: Emitter, node: fx.Node) -> None:
    value = emitter.scalar(node, _INT64) if ops.is_size(node) else emitter.value(node)
    emitter.graph.outputs.append(value)


_INT64 = ir.DataType.INT64
