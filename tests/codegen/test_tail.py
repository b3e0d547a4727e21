"""Pointwise tails are found, printed at the mark of a kernel, or left where that is wrong."""

from __future__ import annotations

import pytest
import torch
from building import Builder
from torch import fx

from redpass.codegen.expression import UnprintableError
from redpass.codegen.tail import find_tail, insert_epilogue

aten = torch.ops.aten

KERNEL = """@triton.jit
def kernel(x, out, n, BLOCK: tl.constexpr):
    place = tl.program_id(0)
    y = tl.load(x + place)
    # epilogue: y
    place = place * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + place, y.to(out.dtype.element_ty), mask=place < n)


def launch(options, x):
    out = torch.empty_like(x)
    kernel[(1,)](
        x, out, x.numel(), **options,
    )
    return out"""


def chain(*, extra: bool = True) -> tuple[Builder, fx.Node, fx.Node]:
    """`tanh(x * 0.5) + skip` after a hot path that is here the input `x` copied."""
    b = Builder()
    x, skip = b.input("x", "batch", 8), b.input("skip", "batch", 8)
    result = b.call(aten.relu.default, x)
    last = b.call(aten.tanh.default, b.call(aten.mul.Tensor, result, 0.5))
    last = b.call(aten.add.Tensor, last, skip) if extra else last
    return b, result, last


def test_a_tail_is_found_with_its_operands() -> None:
    b, result, last = chain()
    b.program(last)
    tail = find_tail(result)
    assert tail is not None
    assert tail.nodes[-1] is last
    assert [node.name for node in tail.extras] == ["skip"]
    assert tail.in_torch("last") == (
        "tail_mul = torch.ops.aten.mul.Tensor(last, 0.5)",
        "tail_tanh = torch.ops.aten.tanh(tail_mul)",
        "last = torch.ops.aten.add.Tensor(tail_tanh, tail_0)",
    )


def test_the_tail_stands_right_above_the_store() -> None:
    """The address is made between mark and store, from a name that meant something else before."""
    b, result, last = chain()
    b.program(last)
    tail = find_tail(result)
    assert tail is not None
    text = insert_epilogue(KERNEL, tail)
    assert "epilogue" not in text
    assert text.split("\n")[4:10] == [
        "    place = place * BLOCK + tl.arange(0, BLOCK)",
        "    tail_0_value = tl.load(tail_0 + place, mask=place < n, other=0.0).to(tl.float32)",
        "    tail_mul = (y * 0.5)",
        "    tail_tanh = precise_tanh(tail_mul)",
        "    tail_add = (tail_tanh + tail_0_value)",
        "    y = tail_add",
    ]
    assert text.startswith("@triton.jit\ndef kernel(x, out, n, BLOCK: tl.constexpr, tail_0):")


def without(text: str, part: str, instead: str = "") -> str:
    assert part in text
    return text.replace(part, instead)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (without(KERNEL, "    # epilogue: y\n"), "marks 0 places"),
        (KERNEL + "\n" + KERNEL, "marks 2 places"),
        (without(KERNEL, "out + place, y", "place, y"), "no plain address"),
        (without(KERNEL, ", mask=place < n"), "no mask"),
        (without(KERNEL, "tl.store", "tl.debug"), "no store follows"),
        (
            without(KERNEL, "    return out", "    kernel[(2,)](\n        x)\n    return out"),
            "of several kernels",
        ),
    ],
)
def test_a_kernel_that_cannot_take_a_tail_says_why(text: str, reason: str) -> None:
    b, result, last = chain()
    b.program(last)
    tail = find_tail(result)
    assert tail is not None
    with pytest.raises(UnprintableError, match=reason):
        insert_epilogue(text, tail)


def test_a_tail_without_operands_needs_no_parameter() -> None:
    b, result, last = chain(extra=False)
    b.program(last)
    tail = find_tail(result)
    assert tail is not None
    assert "def kernel(x, out, n, BLOCK: tl.constexpr):" in insert_epilogue(KERNEL, tail)


def test_operands_can_be_left_to_the_graph() -> None:
    b, result, last = chain()
    b.program(last)
    tail = find_tail(result, with_operands=False)
    assert tail is not None
    assert [node.name for node in tail.nodes] == ["mul_tensor", "tanh_default"]


def read_twice(b: Builder, result: fx.Node) -> list[fx.Node]:
    return [b.call(aten.neg.default, result), b.call(aten.exp.default, result)]


def another_dtype(b: Builder, result: fx.Node) -> list[fx.Node]:
    return [b.call(aten.to.dtype, result, torch.float16)]


def another_shape(b: Builder, result: fx.Node) -> list[fx.Node]:
    return [b.call(aten.add.Tensor, result, b.input("wide", 5, "batch", 8))]


def broadcast_operand(b: Builder, result: fx.Node) -> list[fx.Node]:
    return [b.call(aten.mul.Tensor, result, b.weight("w", torch.randn(8)))]


def no_form(b: Builder, result: fx.Node) -> list[fx.Node]:
    return [b.call(aten.lgamma.default, result)]


@pytest.mark.parametrize(
    "after", [read_twice, another_dtype, another_shape, broadcast_operand, no_form]
)
def test_what_is_no_tail_stays_in_the_graph(after: object) -> None:
    b = Builder()
    result = b.call(aten.relu.default, b.input("x", "batch", 8))
    b.program(*after(b, result))  # type: ignore[operator]
    assert find_tail(result) is None
