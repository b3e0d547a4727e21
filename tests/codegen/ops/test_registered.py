"""The ops as PyTorch sees them: eager, compiled, exported, checked."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn

from redpass.codegen import ops
from tests.codegen.ops.cases import CASES

ops.register()


def called(name: str):
    return getattr(torch.ops.redpass, name).default


@pytest.mark.parametrize("label", CASES)
def test_opcheck(label) -> None:
    name, arguments = CASES[label]
    found = torch.library.opcheck(called(name), arguments)
    assert set(found.values()) == {"SUCCESS"}


@pytest.mark.parametrize("label", CASES)
def test_eager_is_the_reference(label) -> None:
    name, arguments = CASES[label]
    torch.testing.assert_close(called(name)(*arguments), ops.OPS[name].reference(*arguments))


class Calls(nn.Module):
    """One op; tensors come in at the call, all else is fixed."""

    def __init__(self, name: str, arguments: tuple) -> None:
        super().__init__()
        self.call, self.arguments = called(name), arguments

    def forward(self, *tensors: Tensor):
        given = iter(tensors)
        return self.call(*(next(given) if isinstance(a, Tensor) else a for a in self.arguments))


def split(label: str) -> tuple[Calls, tuple[Tensor, ...]]:
    name, arguments = CASES[label]
    return Calls(name, arguments), tuple(a for a in arguments if isinstance(a, Tensor))


@pytest.mark.parametrize("label", CASES)
def test_export_keeps_the_op(label) -> None:
    module, tensors = split(label)
    program = torch.export.export(module, tensors).run_decompositions()
    targets = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert module.call in targets
    torch.testing.assert_close(program.module()(*tensors), module(*tensors))


@pytest.mark.parametrize("label", CASES)
def test_compile_without_a_break(label) -> None:
    module, tensors = split(label)
    torch.compiler.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=True)
    torch.testing.assert_close(compiled(*tensors), module(*tensors))


@pytest.mark.slow
def test_inductor_calls_the_op_in_the_middle_of_a_graph() -> None:
    name, arguments = CASES["add_norm rms"]

    def function(x: Tensor, y: Tensor, weight: Tensor) -> Tensor:
        total, normed = called(name)(x + 1, y, weight, None, 1e-5, "rms")
        return total * normed

    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True)
    torch.testing.assert_close(compiled(*arguments[:3]), function(*arguments[:3]))


def test_export_keeps_dimensions_symbolic() -> None:
    module, tensors = split("gated_feed_forward")
    rows = torch.export.Dim("rows", min=2)
    program = torch.export.export(module, tensors, dynamic_shapes=(({1: rows}, {}, {}, {}),))
    longer = torch.randn(2, 11, 16)
    torch.testing.assert_close(program.module()(longer, *tensors[1:]), module(longer, *tensors[1:]))


@pytest.mark.parametrize("label", CASES)
def test_fake_results_on_a_gpu_that_is_not_there(label) -> None:
    name, arguments = CASES[label]
    real = called(name)(*arguments)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        moved = [
            torch.empty_strided(a.shape, a.stride(), dtype=a.dtype, device="cuda")
            if isinstance(a, Tensor)
            else a
            for a in arguments
        ]
        fake = called(name)(*moved)
    for one, other in zip(
        *(x if isinstance(x, tuple) else (x,) for x in (real, fake)), strict=True
    ):
        assert (one.shape, one.stride(), one.dtype) == (other.shape, other.stride(), other.dtype)
        assert other.device.type == "cuda"


def test_importing_registers_nothing_and_needs_no_triton() -> None:
    code = (
        "import sys; sys.modules['triton'] = None; import torch, redpass.codegen.ops as ops;"
        "assert not hasattr(torch.ops.redpass, 'rotary'); ops.register(); ops.register();"
        "x = torch.ones(2, 4);"
        "print(torch.ops.redpass.add_norm(x, x, None, None, 0.0, 'rms')[1].tolist())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str([[1.0] * 4] * 2)
