"""Runs kernels in Triton's interpreter, on CPU tensors, against the float64 reference."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter

from redpass.codegen.ops import Config, Op
from redpass.codegen.ops.checking import disagreement
from redpass.codegen.ops.op import tensors


@pytest.fixture(autouse=True)
def _old_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton 3.6 reads a loop's bound off an array of one element, which numpy 2.4 refuses."""
    if not triton.__version__.startswith("3.6"):
        return
    scope = interpreter._LangPatchScope
    put = scope.set_attr

    def set_attr(self: Any, owner: Any, name: str, value: Any) -> None:
        if name == "__index__":
            value = _index
        put(self, owner, name, value)

    monkeypatch.setattr(scope, "set_attr", set_attr)


def _index(value: Any) -> int:
    return int(value.handle.data.item())


@pytest.fixture(autouse=True)
def _products_of_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter keeps bfloat16 as 16-bit integers, and multiplies these as they are."""
    plain = interpreter.InterpreterBuilder.create_dot

    def create_dot(self: Any, a: Any, b: Any, *others: Any) -> Any:
        return plain(self, *(_widened(x) for x in (a, b)), *others)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)


def _widened(value: Any) -> Any:
    if value.dtype.scalar != tl.bfloat16:
        return value
    bits = value.data.astype(np.uint32) << 16
    return interpreter.TensorHandle(bits.view(np.float32), tl.float32)


@pytest.fixture(autouse=True)
def _poisoned() -> Iterator[None]:
    """Fresh memory is NaN: what a kernel forgets to write shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


Check = Callable[..., Any]


@pytest.fixture
def check() -> Check:
    """Runs the kernel of an op; the result must be as right as PyTorch's in the same dtype."""

    def run(op: Op, *arguments: Any, config: Config | None = None, bf16: bool = False) -> Any:
        # Most arithmetic on bfloat16 is wrong in the interpreter: only where a test says that the
        # kernel does none but products.
        assert bf16 or all(t.dtype != torch.bfloat16 for t in tensors(arguments))
        assert op.refuses(*arguments) == ""
        chosen = config or op.configs(*arguments)[0]
        found = op.launch(chosen.options(), *arguments)
        assert disagreement(op, arguments, found) == ""
        return found

    return run


@pytest.fixture
def random() -> Callable[..., torch.Tensor]:
    """Normal numbers: `random(2, 3)`, `random(4, dtype=torch.float16)`."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    return draw
