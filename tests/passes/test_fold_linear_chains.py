"""`fold_linear_chains`: products where they do not grow, low-rank pairs kept."""

from itertools import pairwise

import torch
from building import Builder, aten
from checking import check_numbers, run_pass
from hypothesis import given
from hypothesis import strategies as st

from redpass.passes.fold_linear_chains import FoldLinearChains


def rand(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def chain(b, x, widths, biases, name="l"):
    """One linear per step from width to width; returns the last value."""
    for i, (ins, outs) in enumerate(pairwise(widths)):
        bias = b.weight(f"{name}{i}.bias", rand(outs, seed=i + 50)) if biases[i] else None
        weight = b.weight(f"{name}{i}.weight", rand(outs, ins, seed=i) / ins**0.5)
        x = b.call(aten.linear.default, x, weight, bias)
    return x


def test_two_linears_with_biases_become_one(check_pass):
    b = Builder()
    x = b.input("x", "batch", 6)
    program = b.program(chain(b, x, [6, 12, 5], [True, True]))
    checked = check_pass(FoldLinearChains(), program, [[rand(n, 6)] for n in (1, 4)], "two")
    assert checked.plan.actions[0].saving["parameters"] == (6 * 12 + 12 + 12 * 5 + 5) - (30 + 5)


def test_only_the_first_has_a_bias(check_pass):
    b = Builder()
    program = b.program(chain(b, b.input("x", "batch", 6), [6, 8, 5], [True, False]))
    checked = check_pass(FoldLinearChains(), program, [[rand(3, 6)]])
    assert checked.after.weights["l1.weight_folded_bias"].shape == (5,)


def test_a_chain_of_three_folds_where_each_fold_pays(check_pass):
    b = Builder()
    # 8 -> 4 -> 100 must not fold by itself; with 100 -> 2 folded first, it does.
    program = b.program(chain(b, b.input("x", "batch", 8), [8, 4, 100, 2], [True] * 3))
    checked = check_pass(FoldLinearChains(), program, [[rand(3, 8)]], "three")
    assert checked.after.text.count("= linear(") == 1


def test_what_is_kept(check_pass):
    b = Builder()
    x = b.input("x", "batch", 16)
    low_rank = chain(b, x, [16, 2, 16], [False, True], "low")
    shared = chain(b, x, [16, 20, 4], [True, True], "shared")
    inner = b.call(aten.linear.default, x, b.weight("read.weight", rand(20, 16)))
    twice = b.call(aten.linear.default, inner, b.weight("twice.weight", rand(4, 20)))
    other = b.call(aten.neg.default, next(n for n in b.graph.nodes if n.name == "shared0_weight"))
    program = b.program(low_rank, shared, other, inner, twice)
    checked = check_pass(FoldLinearChains(), program, [[rand(3, 16)]], "kept")
    assert not checked.plan.actions
    assert len(checked.plan.skips) == 3


def test_a_matrix_stored_the_other_way_round(check_pass):
    b = Builder()
    x = b.input("x", "batch", 6)
    h = b.call(aten.addmm.default, b.weight("b0", rand(9)), x, b.weight("w0", rand(6, 9)))
    y = b.call(aten.mm.default, h, b.weight("w1", rand(9, 4)))
    checked = check_pass(FoldLinearChains(), b.program(y), [[rand(3, 6)]], "addmm_mm")
    assert "addmm(" in checked.after.text


def test_weights_without_data_fold_by_shape():
    b = Builder()
    x = b.input("x", "batch", 6)
    h = b.call(aten.linear.default, x, b.weight("a", torch.empty(9, 6, device="meta")))
    y = b.call(aten.linear.default, h, b.weight("b", torch.empty(4, 9, device="meta")))
    assert run_pass(FoldLinearChains(), b.program(y)).after.weights["b_folded"].shape == (4, 6)


@given(
    widths=st.lists(st.integers(1, 12), min_size=3, max_size=6),
    biases=st.lists(st.booleans(), min_size=5, max_size=5),
    rows=st.integers(1, 5),
)
def test_any_chain_keeps_its_meaning_and_never_grows(widths, biases, rows):
    b = Builder()
    program = b.program(chain(b, b.input("x", "batch", widths[0]), widths, biases))
    checked = run_pass(FoldLinearChains(), program)
    check_numbers(FoldLinearChains.exactness, program, checked.after, [rand(rows, widths[0])])
    matrices = [
        sum(w.numel() for w in p.weights.values() if w.dim() == 2) for p in (program, checked.after)
    ]
    assert matrices[1] <= matrices[0]
