"""Runs a program in float64: the truth that both sides of a comparison are measured against."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from redpass.errors import RedpassError, VerifyError
from redpass.program import Program

WIDER: Mapping[torch.dtype, torch.dtype] = {
    torch.float32: torch.float64,
    torch.float16: torch.float64,
    torch.bfloat16: torch.float64,
    torch.complex64: torch.complex128,
}
"""Dtypes that a reference run replaces, and by what."""


def reference(program: Program, inputs: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    """Runs `program` with every floating-point value in float64.

    Weights and inputs are widened as they are (a bfloat16 weight keeps its bfloat16 value), and
    each argument that names a narrower dtype (`to`, `arange`, `full`, `softmax`, `sum`) names
    float64 instead, so no rounding to a narrow type is left. Integers, booleans and scalar
    constants, the smallest float32 in masks among them, stay what they are.

    Args:
        inputs: input port name -> tensor; names that are no inputs are ignored.

    Returns:
        The outputs in the order of the signature.

    Raises:
        VerifyError: a node that cannot run in float64, or weights without data.
    """
    if program.is_fake:
        raise VerifyError("the weights carry no data", hint="load the model without fake=True")
    values = [inputs[port.name] for port in program.signature.inputs]
    with torch.no_grad(), _double_by_default():
        return _Wide(program).run(*values)  # type: ignore[no-any-return]


@contextlib.contextmanager
def _double_by_default() -> Iterator[None]:
    """Lets ops that invent a dtype (a true division of integers) invent float64."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


class _Wide(fx.Interpreter):
    """Interprets the program's own graph; weights are widened when read and freed after use."""

    def __init__(self, program: Program) -> None:
        super().__init__(torch.nn.Module(), garbage_collect_values=True, graph=program.graph)
        self._weights = program.weights

    def run_node(self, n: fx.Node) -> Any:
        try:
            value = super().run_node(n)
        except RedpassError:
            raise
        except Exception as error:
            found = f"cannot run in float64: {error}"
            raise VerifyError(found, place=n.name, hint="the op needs a float64 kernel") from error
        return value if n.op == "output" else fx.node.map_aggregate(value, _widen)

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:  # noqa: ARG002
        return self._weights[str(target)]

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        args = fx.node.map_aggregate(args, _wide_dtype)
        kwargs = {key: _wide_option(key, value) for key, value in kwargs.items()}
        if isinstance(target, torch._ops.OpOverload):
            names = [parameter.name for parameter in target._schema.arguments]
            args = tuple(
                _wide_option(name, value) for name, value in zip(names, args, strict=False)
            )
        return target(*args, **kwargs)


def _wide_option(name: str, value: Any) -> Any:
    # A softmax that casts half to float inside refuses inputs that are already wide.
    return False if name == "half_to_float" else _wide_dtype(value)


def _wide_dtype(value: Any) -> Any:
    return WIDER.get(value, value) if isinstance(value, torch.dtype) else value


def _widen(value: Any) -> Any:
    if isinstance(value, Tensor) and value.dtype in WIDER:
        return value.to(WIDER[value.dtype])
    return value
