"""`shorten_chains` on graphs made by hand."""

import pytest
import torch
from building import Builder, aten, special_values
from checking import run_pass

from redpass.passes.shorten_chains import ShortenChains

ROWS = [1, 2, 7]


def test_reshapes_of_reshapes(check_pass):
    b = Builder()
    x = b.input("x", "batch", 4, 6)
    a = b.call(aten.unsqueeze.default, b.call(aten.view.default, x, [-1, 24]), 1)
    out = b.call(aten.reshape.default, b.call(aten.flatten.using_ints, a, 0, 1), [-1, 2, 12])
    inputs = [[special_values(n, 4, 6)] for n in ROWS]
    checked = check_pass(ShortenChains(), b.program(out), inputs, "reshapes")
    assert "reshape(%x, [-1, 2, 12])" in checked.after.text


def test_reshapes_that_copied_or_changed_the_dtype_stay(check_pass):
    b = Builder()
    x = b.input("x", "batch", 4, 6)
    turned = b.call(aten.reshape.default, b.call(aten.transpose.int, x, 1, 2), [-1, 24])
    bits = b.call(aten.view.dtype, x, torch.int32)
    outs = [b.call(aten.view.default, v, [-1, 3, 8]) for v in (turned, bits)]
    flat = b.call(aten.view.default, x, [-1, 24])
    outs.append(b.call(aten.view.dtype, flat, torch.float32))
    inputs = [[special_values(n, 4, 6)] for n in ROWS]
    checked = check_pass(ShortenChains(), b.program(*outs), inputs, "turned")
    assert not checked.plan.actions
    assert len(checked.plan.skips) == 1


@pytest.mark.parametrize(
    ("first", "between", "last"),
    [
        (torch.float16, torch.float32, torch.float16),
        (torch.float32, torch.float64, torch.bfloat16),
        (torch.bool, torch.int64, torch.float32),
        (torch.int8, torch.int32, torch.uint8),
    ],
)
def test_casts_by_way_of_a_wider_dtype(check_pass, first, between, last):
    b = Builder()
    x = b.input("x", "batch", 4, dtype=first)
    out = b.call(aten.to.dtype, b.call(aten.to.dtype, x, between), last)
    values = special_values(2, 4) if first.is_floating_point else torch.randint(-90, 90, (2, 4))
    name = "casts" if first is torch.float16 else None
    checked = check_pass(ShortenChains(), b.program(out), [[values.to(first)]], name)
    assert len(checked.plan.actions) == 1


@pytest.mark.parametrize(
    ("first", "between"),
    [
        (torch.float32, torch.bfloat16),
        (torch.int64, torch.float32),
        (torch.float16, torch.bfloat16),
        (torch.float32, torch.bool),
        (torch.int8, torch.uint8),
    ],
)
def test_casts_that_lose_something_stay(check_pass, first, between):
    b = Builder()
    x = b.input("x", "batch", 4, dtype=first)
    out = b.call(aten.to.dtype, b.call(aten.to.dtype, x, between), torch.float64)
    name = "lossy" if between is torch.float32 else None
    assert not check_pass(ShortenChains(), b.program(out), [], name).plan.actions


def test_what_others_read_stays_in_the_graph():
    b = Builder()
    x = b.input("x", "batch", 4)
    wide = b.call(aten.to.dtype, x, torch.float64)
    out = b.call(aten.to.dtype, wide, torch.float16)
    after = run_pass(ShortenChains(), b.program(wide, out)).after
    assert after.text.count("= to.dtype(%x") == 2
