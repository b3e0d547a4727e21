"""Kernels on a GPU against their references, in every dtype they take; skipped without one."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hot_models
import pytest
import torch

from redpass.codegen.emit import emit
from redpass.codegen.ops import OPS, dispatch, register
from redpass.codegen.ops.checking import disagreement
from redpass.codegen.ops.op import Op
from redpass.codegen.tune import materialised
from redpass.lowering import lower, on_device
from redpass.verify.inputs import random_inputs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU"),
]

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fresh memory is NaN, and TF32 is off: float32 means float32."""
    register()
    dispatch.forget()
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", OPS.values(), ids=lambda op: op.name)
def test_every_config_is_as_right_as_the_reference(op: Op, dtype: torch.dtype) -> None:
    for label, arguments in op.samples(dtype):
        probe = op.probe(*map(materialised, arguments))
        for config in op.configs(*arguments):
            try:
                found = op.launch(config.options(), *probe)
            except Exception as error:
                # A card with less shared memory than an H100 does not take every config.
                if "out of resource" not in str(error):
                    raise
                continue
            assert disagreement(op, probe, found) == "", f"{label}, {config}"


@pytest.mark.parametrize("op", OPS.values(), ids=lambda op: op.name)
def test_full_sizes_agree_with_the_reference_of_the_same_dtype(op: Op) -> None:
    """In bfloat16, the float64 truth of a full size being too large for the card."""
    for label, arguments in op.samples(torch.bfloat16):
        given = tuple(map(materialised, arguments))
        found, plain = op.launch(op.configs(*given)[0].options(), *given), op.reference(*given)
        pairs = zip(_many(found), _many(plain), strict=True)
        for new, old in pairs:
            assert new.isfinite().all(), label
            error = (new.float() - old.float()).norm() / old.float().norm().clamp_min(1e-30)
            assert float(error) < 2e-2, label


def _many(result: Any) -> tuple[torch.Tensor, ...]:
    return (result,) if isinstance(result, torch.Tensor) else tuple(result)


@pytest.mark.parametrize("op", OPS.values(), ids=lambda op: op.name)
def test_the_dispatcher_runs_the_kernel_and_says_nothing(
    op: Op, recwarn: pytest.WarningsRecorder
) -> None:
    _, arguments = next(iter(op.samples(torch.float16)))
    probe = op.probe(*map(materialised, arguments))
    assert dispatch.why_not(op, probe) == ""
    found = getattr(torch.ops.redpass, op.name)(*probe)
    assert disagreement(op, probe, found) == ""
    assert not [w for w in recwarn if issubclass(w.category, dispatch.KernelWarning)]


@pytest.mark.parametrize("op", OPS.values(), ids=lambda op: op.name)
def test_the_same_bits_come_twice(op: Op) -> None:
    _, arguments = next(iter(op.samples(torch.float16)))
    probe = op.probe(*map(materialised, arguments))
    options = op.configs(*probe)[0].options()
    first, second = (_many(op.launch(options, *probe)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("make", [hot_models.paths, hot_models.llama])
def test_a_lowered_model_computes_what_it_did(make: Any) -> None:
    program = make()
    after = on_device(lower(program, "triton").program, "cuda")
    before = on_device(program, "cuda")
    for sizes in ({"batch": 2, "seq": 33, "past": 0}, {"batch": 1, "seq": 1, "past": 17}):
        values = {k: v.cuda() for k, v in random_inputs(program, sizes).items()}
        for old, new in zip(before(**values), after(**values), strict=True):
            torch.testing.assert_close(new, old, rtol=1e-3, atol=1e-4)


def test_a_lowered_model_compiles_without_a_break() -> None:
    program = on_device(lower(hot_models.paths(), "triton").program, "cuda")
    values = [v.cuda() for v in random_inputs(program, {"batch": 2, "seq": 33}).values()]
    compiled = torch.compile(program.module, fullgraph=True)
    for old, new in zip(program.module(*values), compiled(*values), strict=True):
        torch.testing.assert_close(new, old, rtol=1e-3, atol=1e-4)


def test_emitted_files_run(tmp_path: Path) -> None:
    for file in emit(hot_models.paths())[0]:
        path = tmp_path / f"{file.name}.py"
        path.write_text(file.source)
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[path.stem] = module
        spec.loader.exec_module(module)
        for arguments in file.samples.values():
            given = tuple(map(materialised, arguments))
            for new, old in zip(
                _many(module.run(*given)), _many(module.reference(*given)), strict=True
            ):
                torch.testing.assert_close(new, old, rtol=1e-3, atol=1e-4)
