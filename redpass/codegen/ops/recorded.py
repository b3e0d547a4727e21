"""Writes kernel launches down instead of doing them: what is compiled without a GPU."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from redpass.codegen.ops.op import Config, Op

TYPES = {
    torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.int32: "i32",
    torch.int64: "i64", torch.bool: "i1", torch.int8: "i8", torch.uint8: "u8",
}  # fmt: skip
"""torch dtype -> Triton's name of it."""

OPTIONS = ("num_warps", "num_stages", "maxnreg")
ALIGNMENT = 16
LARGEST_INT32 = 2**31 - 1


@dataclass(frozen=True)
class Launch:
    """One kernel launch, specialised as Triton's own launcher would.

    Attributes:
        kernel: the `@triton.jit` function.
        signature: argument name -> Triton type, `constexpr` for constants.
        constants: argument name -> value. Integers that are 1 and pointers that are None too.
        aligned: arguments known to be multiples of 16: pointers, and integers that are.
        options: `num_warps` and `num_stages`, and `maxnreg` where it is limited.
        grid: numbers of programs.
    """

    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    aligned: tuple[str, ...]
    options: dict[str, int]
    grid: tuple[int, ...]

    @property
    def name(self) -> str:
        """The kernel's name."""
        return str(self.kernel.fn.__name__)

    def source(self) -> Any:
        """Returns what `triton.compile` takes.

        Raises:
            RuntimeError: the kernels were made for the interpreter (`TRITON_INTERPRET=1`).
        """
        import triton

        if not isinstance(self.kernel, triton.runtime.jit.JITFunction):
            raise RuntimeError("kernels made under TRITON_INTERPRET=1 cannot be compiled")
        places = {name: (index,) for index, name in enumerate(self.kernel.arg_names)}
        return triton.compiler.ASTSource(
            fn=self.kernel,
            signature={name: self.signature[name] for name in places},
            constexprs={places[name]: value for name, value in self.constants.items()},
            attrs={places[name]: [["tt.divisibility", ALIGNMENT]] for name in self.aligned},
        )


def recorded(op: Op, config: Config, *arguments: Any) -> tuple[Launch, ...]:
    """Returns the launches that a call would do. Arguments may be on the meta device."""
    with recording() as launches:
        op.launch(config.options(), *arguments)
    return tuple(launches)


@contextlib.contextmanager
def recording() -> Iterator[list[Launch]]:
    """Within it no kernel is launched: the list receives what would have been."""
    from triton.runtime.jit import KernelInterface

    launches: list[Launch] = []

    def noted(kernel: Any, grid: Any) -> Any:
        return lambda *args, **kwargs: launches.append(_launch(kernel, grid, args, kwargs))

    with mock.patch.object(KernelInterface, "__getitem__", noted):
        yield launches


def _launch(kernel: Any, grid: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Launch:
    options = {name: kwargs.pop(name) for name in OPTIONS if name in kwargs}
    bound = {**dict(zip(kernel.arg_names, args, strict=False)), **kwargs}
    constant = {p.name for p in kernel.params if p.is_constexpr}
    signature, constants, aligned = {}, {}, []
    for name, value in bound.items():
        if name in constant or value is None or (type(value) is int and value == 1):
            signature[name], constants[name] = "constexpr", value
            continue
        signature[name] = _type(value)
        if isinstance(value, Tensor) or (type(value) is int and value % ALIGNMENT == 0):
            aligned.append(name)
    return Launch(kernel, signature, constants, tuple(aligned), options, tuple(grid))


def _type(value: Any) -> str:
    if isinstance(value, Tensor):
        return "*" + TYPES[value.dtype]
    if isinstance(value, float):
        return "fp32"
    return "i32" if abs(value) <= LARGEST_INT32 else "i64"
