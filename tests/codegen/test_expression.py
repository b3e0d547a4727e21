"""Printed expressions compute what PyTorch does: each op alone, and chains of them at random."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from building import Builder
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, fx

from redpass.codegen.expression import HELPERS, TABLE, UnprintableError, print_expression, why_not
from redpass.program import Program

triton = pytest.importorskip("triton")
aten = torch.ops.aten

KERNEL = """import triton
import triton.language as tl


{helpers}


@triton.jit
def kernel({pointers}, out, n, BLOCK: tl.constexpr):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = place < n
{loads}
{lines}
    tl.store(out + place, {result}, mask=inside)
"""


def interpreted(source: str, folder: Path) -> Any:
    """Imports kernel source with Triton's interpreter switched on for it alone."""
    path = folder / f"printed_{abs(hash(source))}.py"
    path.write_text(source)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    with triton.knobs.runtime.scope():
        triton.knobs.runtime.interpret = True
        spec.loader.exec_module(module)
    return module.kernel


def run_printed(program: Program, inputs: Sequence[Tensor], folder: Path) -> Tensor:
    """Prints a program's pointwise nodes as a kernel and runs that in the interpreter."""
    leaves = {node: node.name for node in program.inputs}
    printed = print_expression(
        [node for node in program.graph.nodes if node.op == "call_function"], leaves
    )
    loads = [
        f"    {name} = tl.load({name}_in + place, mask=inside, other=1)" for name in leaves.values()
    ]
    source = KERNEL.format(
        helpers="\n\n".join(printed.sources),
        pointers=", ".join(f"{name}_in" for name in leaves.values()),
        loads="\n".join(loads),
        lines="\n".join(f"    {line}" for line in printed.lines),
        result=printed.result,
    )
    n = inputs[0].numel()
    out = torch.full_like(inputs[0], float("nan"))
    with triton.knobs.runtime.scope():
        triton.knobs.runtime.interpret = True
        interpreted(source, folder)[(triton.cdiv(n, 64),)](*inputs, out, n, BLOCK=64)
    return out


def check(
    make: Callable[..., fx.Node], inputs: Sequence[Tensor], folder: Path, allowed: float = 2e-6
) -> None:
    builder = Builder()
    nodes = [builder.input(f"x{i}", len(value)) for i, value in enumerate(inputs)]
    program = builder.program(make(builder, *nodes))
    (expected,) = program(*inputs)
    found = run_printed(program, inputs, folder)
    if expected.dtype is torch.bool:
        assert torch.equal(found.bool(), expected)
        return
    assert torch.equal(found.isnan(), expected.isnan())
    torch.testing.assert_close(found, expected, rtol=allowed, atol=allowed, equal_nan=True)


def normal(size: int = 101, seed: int = 0, scale: float = 2.0) -> Tensor:
    return scale * torch.randn(size, generator=torch.Generator().manual_seed(seed))


def positive(size: int = 101, seed: int = 1) -> Tensor:
    return normal(size, seed).abs() + 0.1


ONE = {
    "neg": aten.neg.default,
    "abs": aten.abs.default,
    "exp": aten.exp.default,
    "sin": aten.sin.default,
    "cos": aten.cos.default,
    "erf": aten.erf.default,
    "square": aten.square.default,
    "sigmoid": aten.sigmoid.default,
    "silu": aten.silu.default,
    "tanh": aten.tanh.default,
    "relu": aten.relu.default,
    "gelu": aten.gelu.default,
    "leaky_relu": aten.leaky_relu.default,
    "clone": aten.clone.default,
    "contiguous": aten.contiguous.default,
    "alias": aten.alias.default,
    "detach": aten.detach.default,
}
OF_POSITIVE = {
    "log": aten.log.default,
    "sqrt": aten.sqrt.default,
    "rsqrt": aten.rsqrt.default,
    "reciprocal": aten.reciprocal.default,
}
TWO = {
    "add": aten.add.Tensor,
    "sub": aten.sub.Tensor,
    "rsub": aten.rsub.Tensor,
    "mul": aten.mul.Tensor,
    "div": aten.div.Tensor,
    "true_divide": aten.true_divide.Tensor,
    "maximum": aten.maximum.default,
    "minimum": aten.minimum.default,
    "eq": aten.eq.Tensor,
    "ne": aten.ne.Tensor,
    "lt": aten.lt.Tensor,
    "le": aten.le.Tensor,
    "gt": aten.gt.Tensor,
    "ge": aten.ge.Tensor,
}
ELSEWHERE = {
    "pow", "clamp", "clamp_min", "clamp_max", "where", "to", "_to_copy", "logical_and",
    "logical_or", "logical_not", "dropout", "feature_dropout", "alpha_dropout",
    "feature_alpha_dropout",
}  # fmt: skip


def test_every_form_is_tested() -> None:
    assert set(TABLE) == ONE.keys() | OF_POSITIVE.keys() | TWO.keys() | ELSEWHERE


@pytest.mark.parametrize("name", sorted(ONE))
def test_an_op_of_one_tensor(name: str, tmp_path: Path) -> None:
    x = torch.cat([normal(), torch.tensor([0.0, -0.0, 1e-3, -1e-5, 30.0, -30.0])])
    check(lambda b, x: b.call(ONE[name], x), [x], tmp_path)


@pytest.mark.parametrize("name", sorted(OF_POSITIVE))
def test_an_op_of_positive_numbers(name: str, tmp_path: Path) -> None:
    check(lambda b, x: b.call(OF_POSITIVE[name], x), [positive()], tmp_path)


@pytest.mark.parametrize("name", sorted(TWO))
def test_an_op_of_two_tensors(name: str, tmp_path: Path) -> None:
    x, y = normal(), positive()
    y[::7] = x[::7]
    check(lambda b, x, y: b.call(TWO[name], x, y), [x, y], tmp_path)


@pytest.mark.parametrize("exponent", [1, 2, 3, 5, 0.5, -0.5, -1, 8.0])
def test_powers(exponent: float, tmp_path: Path) -> None:
    check(lambda b, x: b.call(aten.pow.Tensor_Scalar, x, exponent), [positive()], tmp_path)


def test_gelu_by_tanh(tmp_path: Path) -> None:
    check(lambda b, x: b.call(aten.gelu.default, x, approximate="tanh"), [normal()], tmp_path)


@pytest.mark.parametrize("limits", [(-0.5, 0.5), (None, 0.25), (-1.0, None)])
def test_clamp_keeps_nan(limits: tuple[float | None, float | None], tmp_path: Path) -> None:
    x = normal()
    x[3] = float("nan")
    check(lambda b, x: b.call(aten.clamp.default, x, *limits), [x], tmp_path)


@pytest.mark.parametrize("op", [aten.clamp_min.default, aten.clamp_max.default])
def test_one_sided_clamp(op: Any, tmp_path: Path) -> None:
    check(lambda b, x: b.call(op, x, 0.3), [normal()], tmp_path)


@pytest.mark.parametrize("op", [aten.relu.default, aten.silu.default, aten.tanh.default])
def test_nan_and_infinity_pass_through(op: Any, tmp_path: Path) -> None:
    x = torch.tensor([float("nan"), float("inf"), 0.5])
    check(lambda b, x: b.call(op, x), [x], tmp_path)


@pytest.mark.parametrize("op", [aten.maximum.default, aten.minimum.default])
def test_the_larger_of_a_number_and_nan_is_nan(op: Any, tmp_path: Path) -> None:
    x, y = normal(9), normal(9, 1)
    x[1], y[2] = float("nan"), float("nan")
    check(lambda b, x, y: b.call(op, x, y), [x, y], tmp_path)


def test_tanh_is_exact_to_rounding_near_zero(tmp_path: Path) -> None:
    x = torch.logspace(-6, 0.5, 203)
    builder = Builder()
    program = builder.program(builder.call(aten.tanh.default, builder.input("x0", 203)))
    found, truth = run_printed(program, [x], tmp_path), torch.tanh(x.double())
    assert float(((found - truth) / truth).abs().max()) < 4e-7


def choose(b: Builder, x: fx.Node, y: fx.Node) -> fx.Node:
    smaller = b.call(aten.lt.Tensor, x, y)
    positive = b.call(aten.gt.Scalar, y, 0.0)
    both = b.call(aten.logical_and.default, smaller, positive)
    neither = b.call(aten.logical_not.default, b.call(aten.logical_or.default, smaller, positive))
    inner = b.call(aten.where.self, neither, b.call(aten.neg.default, y), y)
    return b.call(aten.where.self, both, x, inner)


def test_conditions_choose(tmp_path: Path) -> None:
    check(choose, [normal(), normal(seed=1)], tmp_path)


def test_scalars_and_alpha(tmp_path: Path) -> None:
    def make(b: Builder, x: fx.Node, y: fx.Node) -> fx.Node:
        total = b.call(aten.add.Tensor, x, y, alpha=-2)
        return b.call(aten.rsub.Scalar, b.call(aten.mul.Tensor, total, -0.5), 3)

    check(make, [normal(), normal(seed=1)], tmp_path)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_cast_rounds_where_it_stands(dtype: torch.dtype, tmp_path: Path) -> None:
    def make(b: Builder, x: fx.Node) -> fx.Node:
        narrow = b.call(aten._to_copy.default, x, dtype=dtype)
        return b.call(aten.to.dtype, b.call(aten.clone.default, narrow), torch.float32)

    check(make, [normal()], tmp_path, allowed=0.0)


def test_a_cast_to_bfloat16_is_printed() -> None:
    """Only read: the interpreter cuts bfloat16 off where a GPU rounds it."""
    b = Builder()
    x = b.input("x", 3)
    printed = print_expression([b.call(aten.to.dtype, x, torch.bfloat16)], {x: "x"})
    assert printed.lines == ("to_dtype = x.to(tl.bfloat16).to(tl.float32)",)


def test_dropout_that_is_off_is_nothing(tmp_path: Path) -> None:
    check(lambda b, x: b.call(aten.dropout.default, x, 0.5, False), [normal()], tmp_path)


UNARY = st.sampled_from(["sigmoid", "silu", "tanh", "relu", "gelu", "neg", "abs", "clamp", "sin"])
BINARY = st.sampled_from([aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.maximum.default])


@given(steps=st.lists(st.tuples(UNARY, BINARY, st.integers(0, 5)), min_size=1, max_size=6))
def test_chains_compute_what_torch_does(
    steps: list[tuple[str, Any, int]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    def make(b: Builder, x: fx.Node, y: fx.Node) -> fx.Node:
        known = [x, y]
        for name, join, place in steps:
            extra = (-1.5, 1.5) if name == "clamp" else ()
            op = aten.clamp.default if name == "clamp" else ONE[name]
            one = b.call(op, known[place % len(known)], *extra)
            known.append(b.call(join, one, known[-1]))
        return known[-1]

    check(make, [normal(67), normal(67, 1)], tmp_path_factory.mktemp("printed"), allowed=2e-5)


def refused(make: Callable[[Builder], fx.Node]) -> str:
    return why_not(make(Builder()))


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda b: b.call(aten.sum.default, b.input("x", 3)), "'sum' has no Triton form"),
        (lambda b: b.call(aten.pow.Tensor_Scalar, b.input("x", 3), 2.5), "a power of 2.5"),
        (
            lambda b: b.call(aten.div.Tensor_mode, b.input("x", 3), 2, rounding_mode="floor"),
            "a division that rounds",
        ),
        (lambda b: b.call(aten.neg.default, b.input("x", 3, dtype=torch.int64)), "is int64"),
        (
            lambda b: b.call(aten.to.dtype, b.input("x", 3, dtype=torch.bool), torch.float32),
            "a cast between truth values and numbers",
        ),
        (
            lambda b: b.call(aten.dropout.default, b.input("x", 3), 0.5, True),
            "dropout in training mode",
        ),
    ],
)
def test_what_cannot_be_printed_says_why(make: Callable[[Builder], fx.Node], reason: str) -> None:
    assert reason in refused(make)


def test_an_operand_from_elsewhere_is_named() -> None:
    b = Builder()
    x = b.input("x", 3)
    with pytest.raises(UnprintableError, match="'x' is not among the operands"):
        print_expression([b.call(aten.neg.default, x)], {})


def test_nothing_to_print() -> None:
    with pytest.raises(UnprintableError, match="nothing to print"):
        print_expression([], {})


def test_helpers_come_with_what_calls_them() -> None:
    b = Builder()
    x = b.input("x", 3)
    printed = print_expression([b.call(aten.tanh.default, x)], {x: "x"})
    assert printed.sources == (HELPERS["precise_tanh"],)
    assert not print_expression([b.call(aten.neg.default, x)], {x: "x"}).sources
