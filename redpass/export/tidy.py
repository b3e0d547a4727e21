"""Last changes to an ONNX graph, whoever wrote it: what is dead or equal, what runs slowly."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import common

from redpass.export.sizes import type_of
from redpass.program import Program

LIMIT = 1024
"""Constants above this many bytes are not compared: weights are told apart by name already."""


def tidy(model: ir.Model, program: Program) -> None:
    """Changes `model` in place; what it computes stays the same to the bit or by one rounding.

    Afterwards inputs and outputs have the names, element types and sizes of the program's ports.
    """
    keep_norms_apart(model.graph)
    for step in (
        common.IdentityEliminationPass(),
        common.CommonSubexpressionEliminationPass(size_limit=LIMIT),
        common.RemoveUnusedNodesPass(),
        common.RemoveUnusedOpsetsPass(),
        common.ClearMetadataAndDocStringPass(),
        common.OutputFixPass(),
    ):
        step(model)
    for value in [value for node in model.graph for value in node.outputs]:
        # The sizes of inner values follow from those of the inputs.
        value.shape = value.type = None
    ports = (*program.signature.inputs, *program.signature.outputs)
    for port, value in zip(ports, (*model.graph.inputs, *model.graph.outputs), strict=True):
        value.name, value.shape = port.name, ir.Shape(port.shape)
        value.type = ir.TensorType(type_of(port.dtype))
    common.NameFixPass()(model)


def keep_norms_apart(graph: ir.Graph) -> None:
    """Writes the sum in front of a layer norm as `Sum`, where ONNX Runtime would fuse the two.

    Its CPU kernel for the pair, `SkipLayerNormalization`, is not vectorised: with 128 rows of 384
    numbers it takes 4.3 times as long as the two kernels (4.8 times with 1024 rows; with one row
    0.87). It is made of an Add that nothing else reads; a Sum stays what it is.
    """
    for node in graph:
        if node.op_type not in ("LayerNormalization", "SimplifiedLayerNormalization"):
            continue
        total = node.inputs[0].producer() if node.inputs[0] is not None else None
        if total is None or not _is_private_add(total):
            continue
        parts: list[ir.Value | None] = []
        for value in total.inputs:
            before = value.producer() if value is not None else None
            inner = before is not None and len(parts) < 2 and _is_private_add(before)
            parts += before.inputs if before is not None and inner else [value]
        new = ir.node("Sum", parts)
        graph.insert_before(total, new)
        new.outputs[0].name, new.outputs[0].shape = total.outputs[0].name, total.outputs[0].shape
        total.outputs[0].replace_all_uses_with(new.outputs[0])


def _is_private_add(node: ir.Node) -> bool:
    value = node.outputs[0]
    return node.op_type == "Add" and len(value.uses()) == 1 and not value.is_graph_output()
