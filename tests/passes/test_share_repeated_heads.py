"""`share_repeated_heads`: copies of key and value heads go, in both spellings."""

import torch
from building import Builder, aten
from checking import run_pass

from redpass.passes.share_repeated_heads import ShareRepeatedHeads

sdpa = aten.scaled_dot_product_attention.default


def rand(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def ports(b, groups=2):
    q = b.input("q", "batch", 4, "seq", 8)
    k, v = (b.input(name, "batch", groups, "past", 8) for name in "kv")
    return q, k, v


def values(batch, seq, past, groups=2):
    shape = (batch, groups, past, 8)
    return [rand(batch, 4, seq, 8), rand(*shape, seed=1), rand(*shape, seed=2)]


def copied(b, x, times, axis=2):
    """Repeats the heads `[b, g, t, d]` as `unsqueeze, expand, reshape` do."""
    _, groups, _, size = x.meta["val"].shape
    sizes = [b.call(aten.sym_size.int, x, i) for i in (0, 2)]
    wide = [sizes[0], groups, sizes[1], size]
    wide.insert(axis, times)
    expanded = b.call(aten.expand.default, b.call(aten.unsqueeze.default, x, axis), wide)
    shape = [sizes[0], groups * times, sizes[1], size]
    return b.call(aten.reshape.default, b.call(aten.clone.default, expanded), shape)


def test_heads_copied_by_expansion(check_pass):
    b = Builder()
    q, k, v = ports(b)
    mask = b.input("mask", "batch", 1, "seq", "past")
    y = b.call(sdpa, q, copied(b, k, 2), copied(b, v, 2), mask, scale=0.25)
    inputs = [[*values(n, s, t), rand(n, 1, s, t)] for n, s, t in ((1, 1, 9), (3, 5, 5))]
    checked = check_pass(ShareRepeatedHeads(), b.program(y), inputs, "expanded")
    assert "expand" not in checked.after.text
    assert "enable_gqa=True" in checked.after.text


def test_heads_copied_by_repeat_interleave(check_pass):
    b = Builder()
    q, k, v = ports(b)
    k4, v4 = (b.call(aten.repeat_interleave.self_int, x, 2, 1) for x in (k, v))
    program = b.program(b.call(sdpa, q, k4, v4, None, 0.0, False))
    checked = check_pass(ShareRepeatedHeads(), program, [values(2, 3, 6)], "interleaved")
    assert "repeat_interleave" not in checked.after.text


def test_one_head_for_all(check_pass):
    b = Builder()
    q, k, v = ports(b, groups=1)
    program = b.program(b.call(sdpa, q, copied(b, k, 4), copied(b, v, 4)))
    assert check_pass(ShareRepeatedHeads(), program, [values(2, 3, 6, groups=1)]).plan.actions


def test_copies_that_others_read_stay_for_them():
    b = Builder()
    q, k, v = ports(b)
    k4 = copied(b, k, 2)
    after = run_pass(
        ShareRepeatedHeads(), b.program(b.call(sdpa, q, k4, copied(b, v, 2)), k4)
    ).after
    assert after.text.count("= expand(") == 1


def test_what_is_left_alone(check_pass):
    b = Builder()
    q, k, v = ports(b)
    full = b.input("full", "batch", 4, "past", 8)
    one, half = b.input("one", "batch", 1, "past", 8), copied(b, k, 2)
    outs = [b.call(sdpa, q, half, full)]
    outs.append(b.call(sdpa, q, half, copied(b, one, 4)))
    outs.append(
        b.call(sdpa, b.input("q8", "batch", 8, "seq", 8), half, copied(b, v, 2), enable_gqa=True)
    )
    inputs = [[*values(2, 3, 5), rand(2, 4, 5, 8), rand(2, 1, 5, 8), rand(2, 8, 3, 8)]]
    checked = check_pass(ShareRepeatedHeads(), b.program(*outs), inputs, "left_alone")
    assert [len(checked.plan.actions), len(checked.plan.skips)] == [0, 3]


def test_tiled_heads_are_not_grouped_heads():
    """Heads 0 1 0 1 are another order than 0 0 1 1; the op means the second."""
    b = Builder()
    q, k, v = ports(b)
    tiled = [copied(b, x, 2, axis=1) for x in (k, v)]
    plan = run_pass(ShareRepeatedHeads(), b.program(b.call(sdpa, q, *tiled))).plan
    assert not plan.actions
    assert not plan.skips


def test_attention_without_copies_is_no_candidate():
    b = Builder()
    q = b.input("q", "batch", 4, "seq", 8)
    plan = run_pass(ShareRepeatedHeads(), b.program(b.call(sdpa, q, q, q))).plan
    assert not plan.actions
    assert not plan.skips
