"""`merge_linears`: what is merged, what is left apart, and that slices serve every reader."""

import torch
from building import Builder, aten
from checking import check_numbers, run_pass
from hypothesis import given
from hypothesis import strategies as st

import redpass
from redpass.facts import Facts
from redpass.passes.merge_linears import MergeLinears


def rand(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def linear(b, x, name, outs, ins, bias=True, seed=0):
    w = b.weight(f"{name}.weight", rand(outs, ins, seed=seed))
    v = b.weight(f"{name}.bias", rand(outs, seed=seed + 1)) if bias else None
    return b.call(aten.linear.default, x, w, v)


def heads(b, x, count, size):
    split = b.call(aten.view.default, x, [-1, x.meta["val"].shape[1], count, size])
    return b.call(aten.transpose.int, split, 1, 2)


def inputs(*sizes, width=16):
    return [[rand(n, 7, width, seed=n)] for n in sizes]


def test_query_key_value_of_different_widths_and_some_without_bias(check_pass):
    b = Builder()
    x = b.input("x", "batch", 7, 16)
    q = linear(b, x, "q", 16, 16, seed=1)
    k = linear(b, x, "k", 8, 16, bias=False, seed=2)
    v = linear(b, x, "v", 8, 16, seed=3)
    program = b.program(heads(b, q, 4, 4), heads(b, k, 2, 4), heads(b, v, 2, 4))
    checked = check_pass(MergeLinears(), program, inputs(1, 3), "query_key_value")
    assert checked.after.text.count("= linear(") == 1
    assert checked.after.weights["q.weight_merged"].shape == (32, 16)
    assert checked.after.weights["q.weight_merged_bias"][16:24].eq(0).all()


def test_without_any_bias_none_is_added():
    b = Builder()
    x = b.input("x", "batch", 7, 16)
    after = run_pass(
        MergeLinears(),
        b.program(linear(b, x, "a", 4, 16, bias=False), linear(b, x, "b", 4, 16, bias=False)),
    ).after
    assert list(after.weights) == ["a.weight_merged"]


def test_matrices_stored_the_other_way_round_stay_so(check_pass):
    b = Builder()
    x = b.input("x", "batch", 16)
    parts = [
        b.call(
            aten.addmm.default,
            b.weight(f"b{i}", rand(6, seed=i)),
            x,
            b.weight(f"w{i}", rand(16, 6)),
        )
        for i in range(2)
    ]
    parts.append(b.call(aten.mm.default, x, b.weight("w2", rand(16, 4, seed=5))))
    checked = check_pass(MergeLinears(), b.program(*parts), [[rand(3, 16)], [rand(1, 16)]], "addmm")
    assert checked.after.weights["w0_merged"].shape == (16, 16)


def test_what_is_left_apart(check_pass):
    b = Builder()
    wide, grown = b.input("wide", "batch", 16), b.input("grown", "batch", 4)
    x = b.input("x", "batch", 7, 8)
    outs = [linear(b, wide, f"wide{i}", 4, 16) for i in range(2)]
    outs += [linear(b, grown, f"grown{i}", 16, 4) for i in range(2)]
    tied = b.weight("tied", rand(4, 8))
    outs += [b.call(aten.linear.default, x, tied), b.call(aten.neg.default, tied)]
    flat = linear(b, x, "flat", 4, 8)
    outs += [b.call(aten.view.default, flat, [-1, 28]), linear(b, x, "alone", 4, 8)]
    values = [[rand(n, 16), rand(n, 4), rand(n, 7, 8)] for n in (1, 3)]
    checked = check_pass(MergeLinears(max_width=8), b.program(*outs), values, "left_apart")
    assert not checked.plan.actions
    assert len(checked.plan.skips) == 4


def test_one_that_is_left_does_not_hold_back_the_others():
    b = Builder()
    x = b.input("x", "batch", 7, 8)
    flat = b.call(aten.view.default, linear(b, x, "flat", 4, 8), [-1, 28])
    parts = [linear(b, x, name, 4, 8) for name in "ab"]
    checked = run_pass(MergeLinears(), b.program(flat, *parts))
    assert [len(checked.plan.actions), len(checked.plan.skips)] == [1, 1]


def test_the_same_tensor_under_two_names_is_shared():
    b = Builder()
    x = b.input("x", "batch", 8)
    w = rand(4, 8)
    parts = [b.call(aten.linear.default, x, b.weight(name, w)) for name in "ab"]
    checked = run_pass(MergeLinears(), b.program(*parts))
    assert [s.reason[:9] for s in checked.plan.skips] == ["a is read", "b is read"]


def test_two_types_are_not_mixed():
    b = Builder()
    x = b.input("x", "batch", 8)
    half = b.call(aten.to.dtype, x, torch.bfloat16)
    left = linear(b, x, "a", 4, 8)
    right = b.call(aten.linear.default, half, b.weight("c", rand(4, 8).bfloat16()))
    assert not run_pass(MergeLinears(), b.program(left, right)).plan.actions


def test_weights_without_data_merge_by_shape():
    b = Builder()
    x = b.input("x", "batch", 8)
    parts = [
        b.call(aten.linear.default, x, b.weight(n, torch.empty(4, 8, device="meta"))) for n in "ab"
    ]
    after = run_pass(MergeLinears(), b.program(*parts)).after
    assert after.weights["a_merged"].is_meta
    assert after.weights["a_merged"].shape == (8, 8)


@given(
    widths=st.lists(st.integers(1, 9), min_size=2, max_size=4),
    biases=st.lists(st.booleans(), min_size=4, max_size=4),
    rows=st.integers(1, 5),
)
def test_any_widths_and_biases(widths, biases, rows):
    b = Builder()
    x = b.input("x", "batch", 7, 12)
    parts = [
        linear(b, x, f"l{i}", w, 12, bias=has, seed=i)
        for i, (w, has) in enumerate(zip(widths, biases, strict=False))
    ]
    program = b.program(*parts)
    checked = run_pass(MergeLinears(), program)
    check_numbers(MergeLinears.exactness, program, checked.after, inputs(rows, width=12)[0])
    assert len(checked.plan.actions) == 1


def test_a_reader_that_cuts_pieces_keeps_its_linear_apart() -> None:
    class Pieces(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            left, right = self.a(x).chunk(2, dim=-1)
            return left.reshape(-1) * right.reshape(-1) + self.b(x).sum()

    program = redpass.load(
        Pieces().eval(), example={"x": torch.randn(2, 8)}, inputs=["x:float32[batch,8]"]
    )
    plan = MergeLinears().plan(program, Facts(program))
    assert not plan.actions
    assert "contiguous" in plan.skips[0].reason
