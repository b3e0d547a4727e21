"""Half-precision products where the processor has no arithmetic for them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from redpass import half_precision
from redpass.frontend.trace import trace
from redpass.program import Origin, Program, interpret
from redpass.verify.originals import run_port

DTYPES = (torch.float16, torch.bfloat16)
PRODUCTS = {"mm", "addmm", "bmm", "convolution", "_scaled_dot_product_flash_attention_for_cpu"}


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv1d(8, 16, 3, padding=1)
        self.up = torch.nn.Linear(16, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.up(self.conv(x).transpose(1, 2)).relu()
        heads = hidden.unflatten(2, (4, 8)).transpose(1, 2)
        mixed = torch.nn.functional.scaled_dot_product_attention(heads, heads, heads)
        return mixed @ mixed.transpose(2, 3) + 1


class Watch(TorchDispatchMode):
    """Notes the dtypes that products are computed in."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name.split("::")[1] in PRODUCTS:
            self.dtypes.add(args[0].dtype)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(half_precision, "is_fast", lambda dtype: False)


def traced(dtype: torch.dtype) -> tuple[Program, torch.Tensor]:
    torch.manual_seed(0)
    x = torch.randn(2, 8, 12).to(dtype)
    net = Net().to(dtype).eval()
    return trace(net, {"x": x}, origin=Origin("Net", "module", "")), x


@pytest.mark.parametrize("dtype", DTYPES)
def test_products_are_computed_in_single_precision_and_rounded(
    dtype: torch.dtype, slow: None
) -> None:
    program, x = traced(dtype)
    port = program.signature.outputs[0].name
    with Watch() as watch:
        found = run_port(program, {"x": x}, port)
    assert watch.dtypes == {torch.float32}
    assert found.dtype == dtype
    torch.manual_seed(0)
    exact = Net().to(dtype).double().eval()(x.double())
    own = program(x=x)[0]
    error, usual = ((value.double() - exact).abs().max() for value in (found, own))
    assert error <= 2 * usual + 4 * torch.finfo(dtype).eps * exact.abs().max()


@pytest.mark.parametrize("dtype", DTYPES)
def test_statistics_go_the_same_way(dtype: torch.dtype, slow: None) -> None:
    program, x = traced(dtype)
    seen: dict[str, torch.dtype] = {}

    def watch(node: torch.fx.Node, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            seen[node.name] = value.dtype
        return value

    with Watch() as products:
        interpret(program, [x], watch)
    assert products.dtypes == {torch.float32}
    assert set(seen.values()) == {dtype}


def test_a_program_that_is_called_keeps_its_own_arithmetic(slow: None) -> None:
    program, x = traced(torch.bfloat16)
    with Watch() as products:
        program(x=x)
    assert products.dtypes == {torch.bfloat16}


def test_single_precision_and_fast_halves_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(half_precision, "is_fast", lambda dtype: dtype == torch.bfloat16)
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        program, x = traced(dtype)
        with Watch() as products:
            found = run_port(program, {"x": x}, program.signature.outputs[0].name)
        assert products.dtypes == {dtype}
        assert torch.equal(found, program(x=x)[0])
