"""The text of an emitted file and of its test."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from redpass.codegen.bundle import Bundle


@dataclass(frozen=True)
class Operand:
    """A tensor that an emitted file takes.

    Attributes:
        name: of the parameter.
        dtype: such as `torch.float16`; `int` for a size.
        shape: sizes as text: numbers, or expressions over dimension names. Of a size its value.
        is_tail: whether the epilogue reads it, not the op.
    """

    name: str
    dtype: str
    shape: tuple[str, ...]
    is_tail: bool = False


@dataclass(frozen=True)
class Source:
    """All that an emitted file says; equal hot paths have equal ones.

    Attributes:
        op: name of the `redpass::` op.
        title: what it does, in words.
        arguments: the op's arguments by name, `None` for those left out.
        operands: the tensors it takes, those of the tail last.
        constants: (name, value as text), burned in.
        results: how many tensors the op returns.
        options: per compute capability from which on it holds: (most elements of the first
            operand, launch options as text), in order; the last limit is None.
        reference: name of the reference function.
        bundle: the source of reference and kernel, the tail printed in.
        tail: the pointwise ops after it, as lines of PyTorch that end in an assignment to `last`.
        dims: the dimension names that the sizes mention.
    """

    op: str
    title: str
    arguments: tuple[str, ...]
    operands: tuple[Operand, ...]
    constants: tuple[tuple[str, str], ...]
    results: int
    options: tuple[tuple[int, tuple[tuple[int | None, str], ...]], ...]
    reference: str
    bundle: Bundle
    tail: tuple[str, ...]
    dims: tuple[str, ...]

    @property
    def parameters(self) -> str:
        """The parameters of `run` and `reference`."""
        return ", ".join(operand.name for operand in self.operands)

    @property
    def has_limits(self) -> bool:
        """Whether there are sizes at which the reference runs."""
        return any(text == "None" for _, table in self.options for _, text in table)


def render(source: Source, places: Sequence[str], origin: str) -> str:
    """Returns the text of the module.

    Args:
        places: where in the graph it stands.
        origin: what wrote it, and from which model.
    """
    parts = [
        _docstring(source, places, origin),
        "\n".join(source.bundle.imports),
        _constants(source),
        *(text for _, text in source.bundle.parts if text),
        _reference(source),
        _run(source),
        _CHECK,
    ]
    return "\n\n\n".join(part for part in parts if part) + "\n"


def _docstring(source: Source, places: Sequence[str], origin: str) -> str:
    found = ", ".join(places)
    text = f"Stands for {len(places)} place{'s' * (len(places) != 1)} of the graph: {found}."
    lines = [f'"""{source.title[0].upper()}{source.title[1:]}.', "", *textwrap.wrap(text, 96)]
    lines += textwrap.wrap(f"Written by {origin}.", 96)
    return "\n".join(lines) + '\n"""'


def _constants(source: Source) -> str:
    lines = ["# Constants of this model."]
    lines += [f"{name.upper()} = {value}" for name, value in source.constants]
    lines.append("SHAPES = {")
    for operand in source.operands:
        if operand.dtype == "int":
            continue
        sizes = ", ".join(size if size.isdigit() else repr(size) for size in operand.shape)
        comma = "," if len(operand.shape) == 1 else ""
        lines.append(f'    "{operand.name}": (({sizes}{comma}), {operand.dtype}),')
    lines += [
        "}",
        "# From which compute capability on; most elements of the first operand; blocks.",
    ]
    if source.has_limits:
        lines.append("# None: what PyTorch has is as fast or faster, and runs.")
    lines.append("OPTIONS = {")
    for capability, table in source.options:
        steps = [f"        ({limit}, {text})," for limit, text in table]
        lines += [f"    {capability}: (", *steps, "    ),"]
    lines += [
        "}",
        "# Compute capability to choose for, 90 for 9.0; None asks the GPU that is there.",
    ]
    return "\n".join([*lines, "CAPABILITY = None"])


def _call(source: Source) -> str:
    burned = {name for name, _ in source.constants}
    return ", ".join(name.upper() if name in burned else name for name in source.arguments)


def _reference(source: Source) -> str:
    lines = [
        f"def reference({source.parameters}):",
        '    """What `run` computes, in plain PyTorch."""',
        f"    {_bound(source)} = {source.reference}({_call(source)})",
        *(f"    {line}" for line in source.tail),
        f"    return {_bound(source)}",
    ]
    return "\n".join(lines)


def _bound(source: Source) -> str:
    return ", ".join([*(f"result_{i}" for i in range(source.results - 1)), "last"])


def _run(source: Source) -> str:
    extras = [operand.name for operand in source.operands if operand.is_tail]
    checked = [operand.name for operand in source.operands if operand.dtype != "int"]
    lines = [
        f"def run({source.parameters}):",
        '    """Runs the kernel. Raises ValueError for other shapes or dtypes."""',
        f"    check({', '.join(f'{name}={name}' for name in checked)})",
        f"    options = options_for({source.operands[0].name})",
    ]
    if source.has_limits:
        lines += ["    if options is None:", f"        return reference({source.parameters})"]
    if extras:
        pairs = ", ".join(f'"{name}": {name}.contiguous()' for name in extras)
        lines.append(f"    options = {{**options, {pairs}}}")
    return "\n".join([*lines, f"    return launch(options, {_call(source)})"])


_CHECK = '''def options_for(first):
    """Returns the launch options for a first operand of this size on this GPU, or None."""
    found = CAPABILITY
    if found is None:
        major, minor = torch.cuda.get_device_capability(first.device) if first.is_cuda else (8, 0)
        found = 10 * major + minor
    table = OPTIONS[max(from_ for from_ in OPTIONS if from_ <= max(found, min(OPTIONS)))]
    return next(options for most, options in table if most is None or first.numel() <= most)


def check(**given):
    """Raises ValueError when a tensor is not what this file was written for."""
    for name, tensor in given.items():
        shape, dtype = SHAPES[name]
        fits = len(shape) == tensor.dim() and all(
            isinstance(want, str) or want == size for want, size in zip(shape, tensor.shape)
        )
        if not fits or tensor.dtype != dtype:
            found = f"{tensor.dtype} {list(tensor.shape)}"
            raise ValueError(f"{name}: found {found}, expected {dtype} {list(shape)}")'''


def render_test(source: Source, name: str, cases: Iterable[Mapping[str, int]]) -> str:
    """Returns the text of the test of the module called `name`.

    Args:
        cases: dimension name -> size, for each test case.
    """
    made = [f'        "{operand.name}": {_made(operand)},' for operand in source.operands]
    return _TEST.format(
        name=name,
        dims=", ".join(source.dims),
        made="\n".join(made),
        cases="\n".join(f"    {dict(case)}," for case in cases),
    )


def _made(operand: Operand) -> str:
    if operand.dtype == "int":
        return operand.shape[0]
    if operand.dtype == "torch.bool":
        return f"truths({', '.join(operand.shape)})"
    return f"normal({operand.dtype}, {', '.join(operand.shape)})"


_TEST = '''"""{name} against its reference; without a GPU in Triton's interpreter."""

import os

import pytest
import torch

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # read when kernels are defined

import {name} as kernel  # noqa: E402

DEVICE = "cuda" if HAS_GPU else "cpu"
CASES = [
{cases}
]


def runnable(dtype):
    """The interpreter is wrong on bfloat16: float32 stands in for it there."""
    return torch.float32 if dtype is torch.bfloat16 and not HAS_GPU else dtype


def normal(dtype, *shape):
    return torch.randn(shape).to(DEVICE, runnable(dtype))


def truths(*shape):
    found = torch.rand(shape) < 0.7
    found[..., 0] = True
    return found.to(DEVICE)


def inputs({dims}):
    torch.manual_seed(0)
    return {{
{made}
    }}


def widened(value):
    is_float = isinstance(value, torch.Tensor) and value.is_floating_point()
    return value.double() if is_float else value


def many(result):
    return result if isinstance(result, tuple) else (result,)


def error(found, truth):
    return float((found.double() - truth).norm() / truth.norm().clamp_min(1e-30))


@pytest.mark.parametrize("sizes", CASES, ids=str)
def test_the_kernel_is_as_right_as_the_reference(sizes, monkeypatch):
    shapes = {{name: (shape, runnable(dtype)) for name, (shape, dtype) in kernel.SHAPES.items()}}
    monkeypatch.setattr(kernel, "SHAPES", shapes)
    given = inputs(**sizes)
    wide = {{name: widened(value) for name, value in given.items()}}
    results = zip(
        many(kernel.run(**given)),
        many(kernel.reference(**given)),
        many(kernel.reference(**wide)),
        strict=True,
    )
    for found, plain, truth in results:
        assert found.shape == plain.shape
        assert found.dtype == plain.dtype
        assert found.isfinite().all()
        allowed = 2 * error(plain, truth) + 4 * torch.finfo(found.dtype).eps
        assert error(found, truth) <= allowed


def test_another_shape_is_refused():
    given = inputs(**CASES[0])
    first = next(iter(given))
    given[first] = given[first][..., :-1]
    with pytest.raises(ValueError, match=first):
        kernel.run(**given)
'''
