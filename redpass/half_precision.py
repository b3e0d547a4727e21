"""Half-precision products on processors without arithmetic for them: in single precision.

Such processors (x86 without AVX-512, for one) get a generic loop from PyTorch: a linear in float16
or bfloat16 takes seven to ten times as long as in float32 (measured on 1,024 rows of 512 to 2,048
channels, one thread of an AMD EPYC; PyTorch 2.13). Operands are widened, which is exact, and the
result is rounded once, as tensor cores do. Measuring goes this way; what compares a program's own
arithmetic bit by bit, or times it, does not.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

aten = torch.ops.aten

PRODUCTS: frozenset[Callable[..., Any]] = frozenset(
    {
        aten.linear.default, aten.matmul.default, aten.mm.default, aten.bmm.default,
        aten.addmm.default, aten.baddbmm.default, aten.conv1d.default, aten.conv2d.default,
        aten.conv3d.default, aten.scaled_dot_product_attention.default,
    }
)  # fmt: skip
"""Ops whose time is in products of two tensors."""

HALVES = (torch.float16, torch.bfloat16)


def call(target: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Calls an op of a graph; a slow half-precision product is computed in float32 and rounded.

    Args:
        target: what a `call_function` node calls.
        args, kwargs: its operands, tensors in place of nodes.

    Returns:
        What the op returns, of the dtype that it has by itself.
    """
    dtype = _slow_dtype(args[0]) if target in PRODUCTS and args else None
    if dtype is None:
        return target(*args, **kwargs)
    wide_args, wide_kwargs = fx.node.map_aggregate((tuple(args), dict(kwargs)), _wide)
    return target(*wide_args, **wide_kwargs).to(dtype)


def _slow_dtype(operand: Any) -> torch.dtype | None:
    if not isinstance(operand, Tensor) or operand.device.type != "cpu":
        return None
    return None if operand.dtype not in HALVES or is_fast(operand.dtype) else operand.dtype


@functools.cache
def is_fast(dtype: torch.dtype) -> bool:
    """Returns whether PyTorch has fast products of this half on this processor."""
    name = "bf16" if dtype == torch.bfloat16 else "fp16"
    supported = getattr(torch.ops.mkldnn, f"_is_mkldnn_{name}_supported", None)
    return supported is None or bool(supported())


def _wide(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype in HALVES else value
