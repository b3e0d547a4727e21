"""Attention with shared scores is found however its heads are spread, and verifies."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from building import Builder
from checking import check_numbers, drawn, plan_pass, run_pass
from torch import fx

from redpass.codegen.decompose import decompose
from redpass.codegen.emit import emit
from redpass.codegen.lower import LowerHotPaths, find_sites
from redpass.facts import Facts
from redpass.plan import Skip
from redpass.program import Program

aten = torch.ops.aten
ASKED = LowerHotPaths(kernels="triton")
Spreader = Callable[[Builder, fx.Node], fx.Node]


def by_index_select(b: Builder, x: fx.Node) -> fx.Node:
    return b.call(aten.index_select.default, x, 1, b.weight("heads", torch.tensor([0, 1, 0, 1])))


def by_index(b: Builder, x: fx.Node) -> fx.Node:
    heads = b.weight("heads", torch.tensor([1, 0, 0, 1]))
    return b.call(aten.index.Tensor, x, [None, heads])


def by_repeat(b: Builder, x: fx.Node) -> fx.Node:
    return b.call(aten.repeat_interleave.self_int, x, 2, 1)


def by_expand(b: Builder, x: fx.Node) -> fx.Node:
    size, length = (b.call(aten.sym_size.int, x, axis) for axis in (0, 2))
    wide = b.call(aten.expand.default, b.call(aten.unsqueeze.default, x, 2), [-1, -1, 2, -1, -1])
    return b.call(aten.reshape.default, wide, [size, 4, length, 8])


def as_it_is(b: Builder, x: fx.Node) -> fx.Node:
    return x


def attend(
    spread: Spreader, *, key_heads: int = 2, value_heads: int = 4, wide: int = 8, **options: Any
) -> Program:
    """Two query heads spread over four, with keys of `key_heads` and values as they are."""
    b = Builder()
    q = b.input("q", "batch", 2, "seq", 8)
    k = b.input("k", "batch", key_heads, "past", 8)
    v = b.input("v", "batch", value_heads, "past", wide)
    queries = spread(b, q)
    keys = spread(b, k) if key_heads == 2 else k
    mask = options.pop("mask", None)
    given = None if mask is None else b.input("mask", *mask, dtype=torch.bool)
    sdpa = aten.scaled_dot_product_attention.default
    gain = b.weight("gain", torch.tensor(0.5))  # says that the program is on a CPU
    found = b.call(sdpa, queries, keys, v, given, **options)
    return b.program(b.call(aten.mul.Tensor, found, gain))


def values(program: Program, **given: int) -> dict[str, torch.Tensor]:
    return drawn(program, {"batch": 3, "seq": 5, "past": 9, **given})


def reasons(program: Program) -> list[str]:
    found = find_sites(program, Facts(program))
    return [item.reason for item in found if isinstance(item, Skip)]


@pytest.mark.parametrize("spread", [by_index_select, by_index, by_repeat, by_expand])
@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"scale": 0.3}], ids=str)
def test_shared_scores_are_lowered(spread: Spreader, options: dict[str, Any]) -> None:
    program = attend(spread, **options)
    checked = run_pass(ASKED, program)
    assert checked.rules == ["lower.clustered_attention"]
    assert "4 heads share 2 score matrices" in checked.plan.actions[0].reason
    check_numbers(ASKED.exactness, program, checked.after, values(program))


def test_a_mask_for_all_heads_is_taken() -> None:
    program = attend(by_repeat, mask=("batch", 1, "seq", "past"))
    after = run_pass(ASKED, program).after
    check_numbers(ASKED.exactness, program, after, values(program))


@pytest.mark.parametrize("spread", [by_repeat, by_index])
def test_a_cpu_runs_it_without_the_op_at_all_sizes(spread: Spreader) -> None:
    """Eager, copied and compiled with sizes that change, even clusters and uneven ones."""
    program = attend(spread, mask=("batch", 1, "seq", "past"))
    after = run_pass(ASKED, program).after
    assert "redpass.clustered_attention" not in after.module.code
    compiled = torch.compile(after.module, fullgraph=True, dynamic=True, backend="aot_eager")
    for module in (after.module, copy.deepcopy(after.module), compiled):
        for sizes in ({"seq": 5, "past": 9}, {"seq": 1, "past": 300}, {"batch": 1}):
            given = [*values(program, **sizes).values()]
            torch.testing.assert_close(module(*given), program.module(*given))


def test_values_wider_than_keys_are_lowered() -> None:
    """PyTorch's fused kernels take one width only."""
    program = attend(as_it_is, value_heads=2, wide=24)
    checked = run_pass(ASKED, program)
    assert "not as wide as its keys" in checked.plan.actions[0].reason
    check_numbers(ASKED.exactness, program, checked.after, values(program))


def test_grouped_values_keep_their_heads() -> None:
    program = attend(by_repeat, value_heads=2, enable_gqa=True)
    after = run_pass(ASKED, program).after
    (node,) = [n for n in after.graph.nodes if "clustered" in str(n.target)]
    assert node.args[5] == [0, 0, 1, 1]
    check_numbers(ASKED.exactness, program, after, values(program))


def test_plain_attention_is_left_without_a_word() -> None:
    program = attend(as_it_is, value_heads=2)
    plan = plan_pass(ASKED, program)
    assert not plan.actions
    assert not plan.skips


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"key_heads": 4}, "heads that share queries read different keys"),
        ({"mask": ("batch", 4, "seq", "past")}, "its mask differs from head to head"),
        ({"dropout_p": 0.5}, "it drops out scores"),
    ],
)
def test_what_is_no_cluster_says_why(options: dict[str, Any], reason: str) -> None:
    assert reasons(attend(by_repeat, **options)) == [reason]


def test_queries_that_no_head_reads() -> None:
    def some(b: Builder, x: fx.Node) -> fx.Node:
        heads = b.weight("heads", torch.tensor([1, 1, 1, 1]))
        return b.call(aten.index_select.default, x, 1, heads)

    assert reasons(attend(some)) == ["some queries are read by no head"]


def test_head_maps_are_burned_into_the_emitted_file() -> None:
    (file,) = emit(attend(by_index))[0]
    assert "CLUSTERS = [1, 0, 0, 1]" in file.source
    assert "KEYS = [0, 1]" in file.source
    assert "VALUES = [0, 1, 2, 3]" in file.source


@pytest.mark.parametrize("options", [{}, {"is_causal": True}], ids=str)
def test_it_is_written_back_as_standard_ops_and_found_again(options: dict[str, Any]) -> None:
    program = attend(by_repeat, **options)
    after = decompose(run_pass(ASKED, program).after)
    assert "redpass" not in after.text
    check_numbers(ASKED.exactness, program, after, values(program))
    assert [a.rule for a in plan_pass(ASKED, after).actions] == ["lower.clustered_attention"]
