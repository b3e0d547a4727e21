"""What fake values say about a node: its sizes as expressions, its element type in the file."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import sympy
import torch
from torch import Tensor, fx

from redpass import ops
from redpass.errors import ExportError
from redpass.state import size_expression

Size = Any
"""A number, or a sympy expression over dimension names."""
Shape = tuple[Any, ...]

TYPES: dict[torch.dtype, ir.DataType] = {
    torch.float32: ir.DataType.FLOAT,
    torch.float64: ir.DataType.DOUBLE,
    torch.float16: ir.DataType.FLOAT,
    torch.bfloat16: ir.DataType.FLOAT,
    torch.int64: ir.DataType.INT64,
    torch.int32: ir.DataType.INT32,
    torch.int16: ir.DataType.INT16,
    torch.int8: ir.DataType.INT8,
    torch.uint8: ir.DataType.UINT8,
    torch.bool: ir.DataType.BOOL,
}
"""ONNX Runtime has almost no half-precision kernels on the CPU, so halves become float32."""


class UntranslatedError(Exception):
    """An op, or a use of an op, that has no translation here. Never leaves `redpass.export`."""


def size_of(item: Any) -> Any:
    """Returns an int, a float or a bool as it is and a symbolic size as an expression."""
    if isinstance(item, fx.Node):
        found = size_expression(item)
        item = found if found is not None else item.meta.get("val")
    if isinstance(item, torch.SymInt):
        item = item.node.expr
    return int(item) if isinstance(item, sympy.Integer) else item


def shape_of(node: Any) -> Shape:
    """Returns the sizes of a tensor-valued node. Raises `UntranslatedError` for another node."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor):
        raise UntranslatedError(f"'{node.name}' is no tensor")
    return tuple(size_of(size) for size in value.shape)


def type_of(item: fx.Node | torch.dtype) -> ir.DataType:
    """Returns the element type a node or a torch dtype has in the file."""
    dtype = item if isinstance(item, torch.dtype) else item.meta["val"].dtype
    if dtype not in TYPES:
        raise ExportError(
            f"ONNX export knows no {dtype}",
            place=getattr(item, "name", None),
            hint="convert the model to float32 before loading it",
        )
    return TYPES[dtype]


def axis_of(node: fx.Node, *names: str) -> int:
    """Returns an axis argument counted from the front of the node's first operand."""
    rank = max(len(shape_of(node.all_input_nodes[0])), 1)
    return int(ops.argument(node, *names or ("dim",))) % rank
