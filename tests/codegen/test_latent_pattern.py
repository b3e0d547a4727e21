"""Attention over a latent cache is found from its products and its rotation, and verifies."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from building import Builder
from checking import check_numbers, drawn, plan_pass, run_pass
from torch import fx

from redpass.codegen.decompose import decompose
from redpass.codegen.emit import emit
from redpass.codegen.lower import LowerHotPaths, find_sites
from redpass.codegen.patterns.latent_attention import NORMED
from redpass.facts import Facts
from redpass.plan import Skip
from redpass.program import Program

aten = torch.ops.aten
ASKED = LowerHotPaths(kernels="triton")
HEADS, KEY_HEADS, WIDTH, RANK = 4, 2, 8, 6


def rebuilt(b: Builder, name: str, heads: int, *, bias: bool = False) -> fx.Node:
    """Heads `[batch, heads, past, 8]` of latents of 6."""
    latent = b.input(name, "batch", "past", RANK)
    up = b.weight(f"{name}_up", torch.randn(heads * WIDTH, RANK))
    shift = b.weight(f"{name}_shift", torch.randn(heads * WIDTH)) if bias else None
    flat = b.call(aten.linear.default, latent, up, shift)
    size, length = (b.call(aten.sym_size.int, latent, axis) for axis in (0, 1))
    split = b.call(aten.view.default, flat, [size, length, heads, WIDTH])
    return b.call(aten.transpose.int, split, 1, 2)


def rotated(b: Builder, x: fx.Node, *, halves: bool = True, width: int = WIDTH) -> fx.Node:
    """Rotated heads, or their first `width` columns rotated and the others as they are."""
    if width < WIDTH:
        parts = b.call(aten.slice.Tensor, x, 3, 0, width), b.call(aten.slice.Tensor, x, 3, width)
        return b.call(aten.cat.default, [rotated_all(b, parts[0], width, halves), parts[1]], -1)
    return rotated_all(b, x, width, halves)


def rotated_all(b: Builder, x: fx.Node, width: int, halves: bool) -> fx.Node:
    angle = b.input("angle", "batch", "past", width // 2 if halves else width)
    full = b.call(aten.cat.default, [angle, angle], -1) if halves else angle
    tables = [b.call(op, full) for op in (aten.cos.default, aten.sin.default)]
    cos, sin = (b.call(aten.unsqueeze.default, table, 1) for table in tables)
    first = b.call(aten.slice.Tensor, x, 3, 0, width // 2)
    second = b.call(aten.slice.Tensor, x, 3, width // 2, 2**63 - 1)
    turned = b.call(aten.cat.default, [b.call(aten.neg.default, second), first], -1)
    left, right = b.call(aten.mul.Tensor, x, cos), b.call(aten.mul.Tensor, turned, sin)
    return b.call(aten.add.Tensor, left, right)


def normed(b: Builder, x: fx.Node, kind: str) -> fx.Node:
    """Heads after a norm of one of the kinds that models have, or as they are."""
    gain = b.weight("gain", torch.rand(WIDTH) + 0.5) if kind else None
    if kind == "spelled out":
        square = b.call(aten.mean.dim, b.call(aten.pow.Tensor_Scalar, x, 2), [-1], True)
        root = b.call(aten.rsqrt.default, b.call(aten.add.Tensor, square, 0.1))
        return b.call(aten.mul.Tensor, b.call(aten.mul.Tensor, x, root), gain)
    if kind == "layer":
        return b.call(aten.layer_norm.default, x, [WIDTH], gain)
    if kind:
        given = None if kind == "without gain" else gain
        return b.call(aten.rms_norm.default, x, [WIDTH], given, 0.1)
    return x


def attend(
    *, key_bias: bool = False, value_bias: bool = False, halves: bool = True, mask: bool = False,
    norm: str = "", width: int = WIDTH, **options: Any,
) -> Program:  # fmt: skip
    b = Builder()
    query = b.input("query", "batch", HEADS, "seq", WIDTH)
    key = normed(b, rebuilt(b, "keys", KEY_HEADS, bias=key_bias), norm)
    key = rotated(b, key, halves=halves, width=width)
    value = rebuilt(b, "values", KEY_HEADS, bias=value_bias)
    seen = b.input("seen", "batch", 1, "seq", "past", dtype=torch.bool) if mask else None
    sdpa = aten.scaled_dot_product_attention.default
    return b.program(b.call(sdpa, query, key, value, seen, enable_gqa=True, **options))


def values(program: Program) -> dict[str, torch.Tensor]:
    return drawn(program, {"batch": 3, "seq": 2, "past": 9})


@pytest.mark.parametrize("options", [{}, {"mask": True}, {"scale": 0.25}], ids=str)
def test_keys_that_are_rebuilt_are_lowered(options: dict[str, Any]) -> None:
    program = attend(**options)
    checked = run_pass(ASKED, program)
    assert checked.rules == ["lower.latent_attention"]
    assert "keys of 2 heads are rebuilt from 6 numbers" in checked.plan.actions[0].reason
    assert "linear" not in checked.after.text, "neither keys nor values are rebuilt in memory"
    check_numbers(ASKED.exactness, program, checked.after, values(program))


@pytest.mark.parametrize("norm", ["rms", "without gain", "spelled out"])
def test_keys_that_are_normalised_are_lowered(norm: str) -> None:
    """As in Qwen3: between the projection and the rotation, over the columns of a head."""
    program = attend(norm=norm)
    checked = run_pass(ASKED, program)
    assert checked.rules == ["lower.latent_attention"]
    assert "norm" not in checked.after.text
    assert "rsqrt" not in checked.after.text
    (node,) = [n for n in checked.after.graph.nodes if "latent" in str(n.target)]
    assert node.args[-1] == 0.1
    check_numbers(ASKED.exactness, program, checked.after, values(program))
    check_numbers(ASKED.exactness, program, decompose(checked.after), values(program))


def test_the_up_projections_are_views_of_the_weights() -> None:
    program = attend()
    after = run_pass(ASKED, program).after
    for name in ("keys_up", "values_up"):
        view = after.weights[f"{name}_heads"]
        assert view.data_ptr() == program.weights[name].data_ptr()
        assert tuple(view.shape) == (KEY_HEADS, WIDTH, RANK)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"value_bias": True}, "its keys are rebuilt from latents and its values are not"),
        ({"key_bias": True}, "a bias is added to its keys"),
        ({"norm": "layer"}, NORMED),
        ({"width": 4}, "its keys are rotated in part"),
        ({"halves": False}, "its rotary tables are not two equal halves"),
        ({"is_causal": True}, "it drops out scores, or is causal without a mask"),
    ],
)
def test_what_is_not_taken_says_why(options: dict[str, Any], reason: str) -> None:
    program = attend(**options)
    found = [s for s in find_sites(program, Facts(program)) if isinstance(s, Skip)]
    assert [(s.rule, s.reason) for s in found] == [("lower.latent_attention", reason)]
    assert not plan_pass(ASKED, program).actions


def test_it_is_emitted_with_its_ranks() -> None:
    (file,) = emit(attend(mask=True))[0]
    sizes = {operand.name: operand.shape for operand in file.operands}
    assert sizes["key_latent"] == ("batch", "past", "1", "6")
    assert sizes["key_up"] == ("2", "8", "6")
    assert sizes["cos"] == ("batch", "past", "4")
    assert "INTERLEAVED = False" in file.source


def test_it_is_written_back_as_standard_ops() -> None:
    program = attend(mask=True)
    after = decompose(run_pass(ASKED, program).after)
    assert "redpass" not in after.text
    check_numbers(ASKED.exactness, program, after, values(program))


def grouped(*, absorbed: bool, crossed: bool = False) -> Program:
    """Two groups of latents, as `cache_latents` leaves them; `crossed`: heads in another order."""
    b = Builder()
    query = b.input("query", "batch", HEADS, "seq", WIDTH)
    heads = []
    for name, width in (("keys", 2 * WIDTH), ("values", 2 * WIDTH)):
        latents = b.input(name, "batch", 2, "past", RANK)
        if name == "values" and absorbed:
            heads.append(latents)
            continue
        up = b.weight(f"{name}_up", torch.randn(2, RANK, width))
        turned = b.call(aten.transpose.int, b.call(aten.matmul.default, latents, up), 1, 2)
        flat = b.call(aten.flatten.using_ints, turned, 2)
        sizes = [WIDTH, HEADS] if crossed else [HEADS, WIDTH]
        split = b.call(aten.unflatten.int, flat, 2, sizes)
        order = [0, 3, 1, 2] if crossed else [0, 2, 1, 3]
        heads.append(b.call(aten.permute.default, split, order))
    key = rotated(b, heads[0])
    sdpa = aten.scaled_dot_product_attention.default
    value = heads[1]
    if absorbed:
        value = b.call(aten.repeat_interleave.self_int, value, 2, 1)
    return b.program(b.call(sdpa, query, key, value))


@pytest.mark.parametrize("absorbed", [True, False])
def test_latents_of_several_groups_are_lowered(absorbed: bool) -> None:
    program = grouped(absorbed=absorbed)
    checked = run_pass(ASKED, program)
    assert checked.rules == ["lower.latent_attention"]
    assert "keys of 4 heads are rebuilt from 12 numbers" in checked.plan.actions[0].reason
    check_numbers(ASKED.exactness, program, checked.after, values(program))


def test_heads_in_another_order_are_not_taken() -> None:
    program = grouped(absorbed=True, crossed=True)
    rules = [site.op for site in find_sites(program, Facts(program)) if not isinstance(site, Skip)]
    assert "latent_attention" not in rules
