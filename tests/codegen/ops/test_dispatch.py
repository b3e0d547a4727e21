"""When the kernel runs, when the reference does, and what is said about it.

A call on a GPU goes through `dispatch.run`; here it is given CPU tensors that pass for a GPU's, and
the kernel is whatever a test puts in its place.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from redpass.codegen.ops import OPS, Config, KernelWarning, dispatch, use_configs_of
from redpass.codegen.ops.op import Op
from tests.codegen.ops.cases import CASES

NAME, ARGUMENTS = CASES["add_norm rms"]


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    dispatch.forget()
    monkeypatch.setattr(dispatch, "has_triton", no_fault(True))
    monkeypatch.setattr(dispatch, "device_fault", no_fault(""))
    yield
    monkeypatch.undo()
    use_configs_of(None)
    dispatch.forget()


def no_fault(answer: Any) -> Callable[..., Any]:
    def found(*arguments: Any) -> Any:
        return answer

    found.cache_clear = lambda: None
    return found


class Kernel:
    """Stands for a kernel: counts its launches, and does what it is told."""

    def __init__(self, name: str = NAME, result: Callable[..., Any] | None = None) -> None:
        self.result = result or OPS[name].reference
        self.options: list[dict[str, int]] = []
        self.op: Op = dataclasses.replace(OPS[name], launch=self)

    def __call__(self, options: dict[str, int], *arguments: Any) -> Any:
        self.options.append(options)
        return self.result(*arguments)


def runs(op: Op, *arguments: Any) -> str:
    """Runs an op twice; the result must be right. Returns what was said, at most one line."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(2):
            torch.testing.assert_close(dispatch.run(op, *arguments), op.reference(*arguments))
    assert len(said) <= 1
    assert all(issubclass(line.category, KernelWarning) for line in said)
    return str(said[0].message) if said else ""


@pytest.mark.parametrize("label", CASES)
def test_a_right_kernel_runs_after_one_self_test(label) -> None:
    name, arguments = CASES[label]
    kernel = Kernel(name)
    assert runs(kernel.op, *arguments) == ""
    assert len(kernel.options) == 3


@pytest.mark.parametrize("label", CASES)
def test_probes_are_of_the_same_kind(label) -> None:
    name, arguments = CASES[label]
    op = OPS[name]
    probe = op.probe(*arguments)
    assert op.refuses(*probe) == ""
    assert op.pays(*probe)
    small = name in ("low_rank_linear", "gated_feed_forward")  # few output columns are enough
    assert small or op.kind(*probe) == op.kind(*arguments)
    first, second = (dispatch.tensors(op.probe(*arguments)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def wrong(*arguments: Any) -> Any:
    total, normed = OPS[NAME].reference(*arguments)
    return total, normed * 1.001


def not_a_number(*arguments: Any) -> Any:
    total, normed = OPS[NAME].reference(*arguments)
    return total, normed.index_fill(-1, torch.tensor([3]), torch.nan)


def misshapen(*arguments: Any) -> Any:
    total, normed = OPS[NAME].reference(*arguments)
    return total, normed.flatten()


def failing(*arguments: Any) -> Any:
    raise RuntimeError("ptxas gave up\nand said why")


@pytest.mark.parametrize(
    ("result", "reason"),
    [
        (wrong, "result 1 is wrong: error"),
        (not_a_number, "result 1 has NaN or infinity in"),
        (misshapen, "result 1 is torch.float32"),
        (failing, "its kernel failed: RuntimeError: ptxas gave up"),
    ],
)
def test_a_faulty_kernel_is_found_by_its_self_test(result, reason) -> None:
    kernel = Kernel(result=result)
    said = runs(kernel.op, *ARGUMENTS)
    assert said.startswith("redpass::add_norm runs its reference in PyTorch: " + reason)
    assert "\n" not in said
    assert len(kernel.options) == 1


def test_a_kernel_that_fails_at_one_size_only() -> None:
    """The self-test holds, the real launch does not: from then on that kind is left alone."""

    def result(x, *others):
        if x.shape[0] == 2:
            raise RuntimeError("out of shared memory")
        return OPS[NAME].reference(x, *others)

    kernel = Kernel(result=result)
    assert "out of shared memory" in runs(kernel.op, *ARGUMENTS)
    assert len(kernel.options) == 2


def test_each_kind_is_tested() -> None:
    kernel = Kernel()
    runs(kernel.op, *ARGUMENTS)
    runs(kernel.op, *(a.half() if isinstance(a, torch.Tensor) else a for a in ARGUMENTS))
    assert len(kernel.options) == 6


def test_double_precision_runs_the_reference() -> None:
    kernel = Kernel()
    doubles = [a.double() if isinstance(a, torch.Tensor) else a for a in ARGUMENTS]
    assert "no kernel for float64" in runs(kernel.op, *doubles)
    assert kernel.options == []


def test_a_shape_that_the_kernel_does_not_take() -> None:
    kernel = Kernel()
    row = torch.randn(1, 40_000)
    assert "rows of 40000" in runs(kernel.op, row, row, None, None, 1e-5, "rms")
    assert kernel.options == []


def test_without_triton(monkeypatch) -> None:
    monkeypatch.setattr(dispatch, "has_triton", no_fault(False))
    assert "triton is not installed" in runs(Kernel().op, *ARGUMENTS)


def test_many_rows_of_a_low_rank_linear_are_no_cause_for_words() -> None:
    name, (x, *others) = CASES["low_rank_linear"]
    kernel = Kernel(name)
    assert runs(kernel.op, x.repeat(9, 1, 1), *others) == ""
    assert kernel.options == []


@pytest.mark.parametrize(("capability", "fault"), [((7, 5), "7.5 is below 8.0"), ((9, 0), "")])
def test_old_devices(capability, fault, monkeypatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    dispatch.forget()
    assert fault in dispatch.device_fault(torch.device("cuda"))
    assert bool(dispatch.device_fault(torch.device("cuda"))) == bool(fault)
    dispatch.forget()


def test_a_device_without_kernels(monkeypatch) -> None:
    monkeypatch.undo()
    dispatch.forget()
    assert "no kernels for the device 'cpu'" in runs(Kernel().op, *ARGUMENTS)


def test_the_switch(monkeypatch) -> None:
    monkeypatch.setenv("REDPASS_KERNELS", "reference")
    dispatch.forget()
    kernel = Kernel()
    assert runs(kernel.op, *ARGUMENTS) == ""
    assert kernel.options == []


def test_no_self_test_within_a_graph_capture(monkeypatch) -> None:
    """It would have to wait for the GPU; the kind is tested at the next call outside."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    kernel = Kernel()
    assert "while a CUDA graph is captured" in runs(kernel.op, *ARGUMENTS)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert runs(kernel.op, *ARGUMENTS) == ""
    assert len(kernel.options) == 3


def test_tuned_configs_are_taken_and_the_default_without() -> None:
    kernel, tuned = Kernel(), Config.of(warps=2, BLOCK=16, ROWS=1)
    use_configs_of(lambda op, arguments: tuned if arguments[0].shape[0] == 2 else None)
    runs(kernel.op, *ARGUMENTS)
    default = kernel.op.configs(*ARGUMENTS)[0].options()
    assert kernel.options == [default, tuned.options(), tuned.options()]
    assert tuned.options() != default
