"""The float64 run against an independent one: the Hugging Face module itself, run in float64."""

import copy
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from models import traced
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from redpass.errors import VerifyError
from redpass.program import Program
from redpass.verify.inputs import random_inputs
from redpass.verify.numbers import reference

WIDER = {torch.float32: torch.float64, torch.float16: torch.float64, torch.bfloat16: torch.float64}


class InDouble(TorchFunctionMode):
    """Lets code that casts to float32 on its way cast to float64 instead."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.float:
            return args[0].double()
        widened = [WIDER.get(a, a) if isinstance(a, torch.dtype) else a for a in args]
        options = {
            key: WIDER.get(value, value) if isinstance(value, torch.dtype) else value
            for key, value in (kwargs or {}).items()
        }
        return func(*widened, **options)


@contextmanager
def default_double() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def run_in_double(module: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    wide = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
    module = copy.deepcopy(module).double()
    if hasattr(module, "set_experts_implementation"):
        module.set_experts_implementation("eager")  # the default's kernel has no float64
    with torch.no_grad(), default_double(), InDouble():
        result = module(**wide)
    return result if isinstance(result, Tensor) else result[0]


@pytest.fixture
def zoo(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "analysis"))
    import zoo

    yield zoo
    sys.modules.pop("zoo", None)


def check_architecture(zoo: Any, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    caught: list[nn.Module] = []
    build = zoo.program

    def program(module: nn.Module, *args: Any, **options: Any) -> Program:
        caught.append(module)
        return build(module, *args, **options)

    monkeypatch.setattr(zoo, "program", program)
    traced_program = zoo.BUILDERS[name]()
    inputs = random_inputs(traced_program, {"past": 0}, seed=1)
    state = {source for source, _ in traced_program.signature.state}
    result = reference(traced_program, inputs)[0]
    expected = run_in_double(caught[0].eval(), {k: v for k, v in inputs.items() if k not in state})
    assert result.dtype == torch.float64
    assert ((result - expected).norm() / expected.norm()).item() < 1e-12


@pytest.mark.parametrize("name", ["qwen3", "bert"])
def test_equals_the_module_in_float64(zoo: Any, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    check_architecture(zoo, monkeypatch, name)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["llama", "gpt2", "gemma3", "opt", "gpt_neox", "phi", "falcon", "bloom", "mixtral", "mpnet",
     "modernbert", "vit", "dinov2", "whisper_encoder", "dit"],
)  # fmt: skip
def test_equals_every_architecture_in_float64(
    zoo: Any, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    check_architecture(zoo, monkeypatch, name)


class Casts(nn.Module):
    """Every way to name a dtype, and to leave one to the default."""

    def forward(self, x: Tensor, n: Tensor) -> Tensor:
        y = x.to(torch.bfloat16).softmax(-1, dtype=torch.float32)
        y = y + torch.arange(4, dtype=torch.float32) / 3 + torch.full((4,), 0.1)
        y = y + torch.zeros(4, dtype=torch.float16) + y.new_ones(4) * (n / 7)
        y = y.sum(-1, keepdim=True, dtype=torch.float32) + y.half().float()
        return torch.where(n > 0, y, torch.finfo(torch.float32).min)


def test_no_rounding_to_a_narrow_dtype_is_left() -> None:
    x, n = torch.randn(2, 4), torch.tensor([1, 2, 3, 0])
    program = traced(Casts(), {"x": x, "n": n}, {})
    (result,) = reference(program, {"x": x, "n": n})
    y = x.double().softmax(-1)
    y = y + torch.arange(4).double() / 3 + 0.1 + n.double() / 7
    expected = y.sum(-1, keepdim=True) + y
    assert result.dtype == torch.float64
    assert torch.allclose(result[:, :3], expected[:, :3], rtol=1e-15, atol=0)
    assert (result[:, 3] == torch.finfo(torch.float32).min).all()


def test_weights_inputs_and_the_default_dtype_are_left_alone(masked: Program) -> None:
    inputs = {"input_ids": torch.tensor([[1, 2]]), "attention_mask": torch.tensor([[1, 0]])}
    before = {name: tensor.clone() for name, tensor in masked.weights.items()}
    reference(masked, inputs)
    assert torch.get_default_dtype() == torch.float32
    assert all(torch.equal(masked.weights[name], value) for name, value in before.items())
    with pytest.raises(VerifyError, match="cannot run in float64"):
        reference(masked, {**inputs, "input_ids": torch.tensor([[1, 99]])})
    assert torch.get_default_dtype() == torch.float32
