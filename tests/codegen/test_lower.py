"""Hot paths are found from data flow, lowered where that pays, and left with a reason elsewhere."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import hot_models
import pytest
import torch
from building import Builder
from checking import check_numbers, plan_pass, run_pass
from torch import Tensor, fx

from redpass.analysis.structure import Structure, structure
from redpass.codegen import ops as kernels_of
from redpass.codegen.lower import DECODE, PREFILL, LowerHotPaths, find_sites
from redpass.codegen.patterns import Site
from redpass.codegen.tuning import Device, Records, Shape, Timing
from redpass.facts import Facts
from redpass.plan import Skip
from redpass.program import Program
from redpass.verify.inputs import check_inputs

aten = torch.ops.aten
CARD = Device("NVIDIA H100 80GB HBM3", "580.1")
ASKED = LowerHotPaths(kernels="triton")


def rules(program: Program) -> Counter[str]:
    return Counter(action.rule for action in plan_pass(ASKED, program).actions)


def lowered(program: Program) -> Program:
    checked = run_pass(ASKED, program)
    for values in check_inputs(program, rounds=2):
        check_numbers(ASKED.exactness, program, checked.after, values)
    return checked.after


def test_every_path_of_a_block_is_lowered_and_verifies() -> None:
    program = hot_models.paths()
    assert rules(program) == {
        "lower.add_norm": 2,
        "lower.gated_feed_forward": 1,
        "lower.low_rank_linear": 1,
    }
    names = Counter(
        line.split(" = ")[1].split("(")[0]
        for line in lowered(program).text.split("\n")
        if " = " in line
    )
    assert names["redpass.add_norm"] == 2
    assert names["redpass.low_rank_linear"] == 1
    assert not names["tanh"], "the activation goes into the low-rank linear"


def test_a_llama_is_lowered_and_verifies() -> None:
    program = hot_models.llama()
    assert rules(program) == {
        "lower.add_norm": 4,
        "lower.gated_feed_forward": 2,
        "lower.rotary": 2,
    }
    lowered(program)


def test_without_a_gpu_nothing_is_lowered_unless_asked() -> None:
    plan = plan_pass(LowerHotPaths(), hot_models.paths())
    assert not plan.actions
    (skip,) = plan.skips
    assert skip.target == "graph"
    assert "--kernels triton" in skip.reason


def test_the_reference_can_be_asked_for() -> None:
    plan = plan_pass(LowerHotPaths(kernels="reference"), hot_models.paths())
    assert [skip.reason for skip in plan.skips] == ["reference kernels were asked for"]


def timings(program: Program, ratio: Callable[[str, str], float]) -> Records:
    """Figures for every site of a program: `ratio(op, length)` of the rival's time."""
    found = {}
    for site in find_sites(program, Facts(program)):
        assert isinstance(site, Site)
        op = kernels_of.OPS[site.op]
        for length, sizes in (("decode", DECODE), ("prefill", PREFILL)):
            values = site.values(program, sizes)
            if not op.pays(*values):
                continue
            shape = Shape.of(op, values).bucket
            config = op.configs(*values)[0].options()
            micros = 10 * ratio(site.op, length)
            found[shape] = Timing(shape, config, micros, "torch.compile", 10.0)
    return Records(CARD, found)


def test_only_what_was_measured_to_win_is_lowered() -> None:
    program = hot_models.paths()
    records = timings(program, lambda op, _: 0.7 if op == "add_norm" else 1.2)
    plan = plan_pass(LowerHotPaths(records=records), program)
    assert {action.rule for action in plan.actions} == {"lower.add_norm"}
    assert all("0.70 of the time of torch.compile on NVIDIA H100" in a.reason for a in plan.actions)
    reasons = {skip.rule: skip.reason for skip in plan.skips}
    assert "1.20" in reasons["lower.gated_feed_forward"]


def test_a_kernel_that_wins_in_decoding_only_is_not_lowered() -> None:
    """One graph serves decoding and prefill: a place has to win wherever its kernel would run."""
    program = hot_models.paths()
    records = timings(program, lambda _, length: 0.5 if length == "decode" else 1.5)
    rules_found = {a.rule for a in plan_pass(LowerHotPaths(records=records), program).actions}
    # On many rows the low-rank kernel gives way to two library products, so decoding decides.
    assert rules_found == {"lower.low_rank_linear"}


def test_a_device_without_figures_lowers_nothing() -> None:
    plan = plan_pass(LowerHotPaths(records=Records(CARD)), hot_models.paths())
    assert not plan.actions
    assert {skip.reason for skip in plan.skips} == {f"not measured on {CARD.name}"}


def skips_of(program: Program, op: str) -> list[str]:
    found = find_sites(program, Facts(program))
    return [s.reason for s in found if isinstance(s, Skip) and s.rule == f"lower.{op}"]


def normed(b: Builder, total: fx.Node, width: int = 16, eps: float | None = 1e-5) -> fx.Node:
    return b.call(aten.rms_norm.default, total, [width], None, eps)


def broadcast(b: Builder) -> fx.Node:
    return b.call(aten.add.Tensor, b.input("x", "batch", 5, 16), b.input("y", 5, 16))


def halved(b: Builder) -> fx.Node:
    x, y = (b.input(name, "batch", 16) for name in "xy")
    return b.call(aten.add.Tensor, x, y, alpha=0.5)


def constant(b: Builder) -> fx.Node:
    return b.call(aten.add.Tensor, b.input("x", "batch", 16), 1.0)


def plain(b: Builder) -> fx.Node:
    return b.call(aten.add.Tensor, b.input("x", "batch", 16), b.input("y", "batch", 16))


def over_two_axes(b: Builder) -> fx.Node:
    x, y = (b.input(name, "batch", 4, 16) for name in "xy")
    return b.call(aten.rms_norm.default, b.call(aten.add.Tensor, x, y), [4, 16], None, 1e-5)


def read_inside(b: Builder) -> list[fx.Node]:
    total = plain(b)
    square = b.call(aten.pow.Tensor_Scalar, total, 2)
    mean = b.call(aten.mean.dim, square, [-1], True)
    root = b.call(aten.rsqrt.default, b.call(aten.add.Tensor, mean, 1e-6))
    return [b.call(aten.mul.Tensor, total, root), mean]


def two_norms(b: Builder) -> list[fx.Node]:
    total = plain(b)
    return [normed(b, total), b.call(aten.layer_norm.default, total, [16], None, None, 1e-5)]


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda b: normed(b, broadcast(b)), "the two summands differ in shape or dtype"),
        (lambda b: normed(b, halved(b)), "the add has a constant operand or a factor"),
        (lambda b: normed(b, constant(b)), "the add has a constant operand or a factor"),
        (lambda b: normed(b, plain(b), eps=None), "the norm's eps is no constant"),
        (over_two_axes, "the norm does not run over the last axis alone"),
        (read_inside, "'mean_dim' inside the norm is read elsewhere too"),
        (two_norms, "another norm of add_tensor is lowered with it"),
    ],
)
def test_a_norm_of_a_sum_that_stays_says_why(
    make: Callable[[Builder], fx.Node | list[fx.Node]], reason: str
) -> None:
    builder = Builder()
    made = make(builder)
    program = builder.program(*(made if isinstance(made, list) else [made]))
    assert skips_of(program, "add_norm") == [reason]


def spelled(b: Builder) -> fx.Node:
    """An RMS norm op by op, with a gain."""
    gain = b.weight("gain", torch.rand(16) + 0.5)
    total = plain(b)
    mean = b.call(aten.mean.dim, b.call(aten.pow.Tensor_Scalar, total, 2), [-1], True)
    root = b.call(aten.rsqrt.default, b.call(aten.add.Tensor, mean, 1e-6))
    return b.call(aten.mul.Tensor, b.call(aten.mul.Tensor, total, root), gain)


def test_a_spelled_norm_is_lowered_with_its_gain() -> None:
    b = Builder()
    program = b.program(spelled(b))
    after = run_pass(ASKED, program).after
    assert "redpass.add_norm(%x, %y, %gain, None, 1e-06, rms)" in after.text
    check_numbers(ASKED.exactness, program, after, [torch.randn(3, 16), torch.randn(3, 16)])


def test_a_norm_that_reads_a_cast_of_the_sum_to_its_own_dtype() -> None:
    """In float32, models whose norms compute in float32 go on with the cast's result."""
    b = Builder()
    x, y = b.input("x", "batch", 16), b.input("y", "batch", 16)
    gain = b.weight("gain", torch.rand(16))
    total = b.call(aten.to.dtype, b.call(aten.add.Tensor, x, y), torch.float32)
    mean = b.call(aten.mean.dim, b.call(aten.pow.Tensor_Scalar, total, 2), [-1], True)
    root = b.call(aten.rsqrt.default, b.call(aten.add.Tensor, mean, 1e-5))
    normed = b.call(aten.mul.Tensor, gain, b.call(aten.mul.Tensor, total, root))
    program = b.program(normed, b.call(aten.neg.default, total))
    checked = run_pass(ASKED, program)
    assert checked.rules == ["lower.add_norm"]
    values = {name: torch.randn(3, 16) for name in "xy"}
    check_numbers(ASKED.exactness, program, checked.after, values)


def test_an_operand_that_comes_too_late_is_said() -> None:
    b = Builder()
    total = plain(b)
    gain = b.weight("gain", torch.rand(16) + 0.5)
    program = b.program(b.call(aten.rms_norm.default, total, [16], gain, 1e-6))
    assert skips_of(program, "add_norm") == ["'gain' is computed after the place it is needed at"]


def thin(b: Builder, *, bias: bool = False, rank: int = 3, twice: bool = False) -> list[fx.Node]:
    x = b.input("x", "batch", 16)
    down = b.weight("down", torch.randn(rank, 16))
    up = b.weight("up", torch.randn(12, rank))
    middle = b.call(
        aten.linear.default, x, down, b.weight("b", torch.randn(rank)) if bias else None
    )
    out = [b.call(aten.linear.default, middle, up)]
    return [*out, middle] if twice else out


@pytest.mark.parametrize(
    ("options", "reasons"),
    [
        ({"bias": True}, ["the inner linear has a bias"]),
        ({"twice": True}, ["the thin middle is read elsewhere too"]),
        ({"rank": 9}, []),  # not thin: nothing to say
    ],
)
def test_a_chain_of_linears_that_stays_says_why(options: Any, reasons: list[str]) -> None:
    b = Builder()
    program = b.program(*thin(b, **options))
    assert skips_of(program, "low_rank_linear") == reasons
    assert not rules(program)


def test_factors_stored_transposed_are_lowered() -> None:
    b = Builder()
    x, down, up = b.input("x", "batch", 16), torch.randn(16, 3), torch.randn(3, 12)
    middle = b.call(aten.mm.default, x, b.weight("down", down))
    shift = b.weight("shift", torch.randn(12))
    program = b.program(b.call(aten.addmm.default, shift, middle, b.weight("up", up)))
    after = run_pass(ASKED, program).after
    assert after.weights["down_turned"].data_ptr() == down.data_ptr(), "a view, not a copy"
    check_numbers(ASKED.exactness, program, after, [torch.randn(3, 16)])


def halves(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), -1)


def pairs(x: Tensor) -> Tensor:
    return torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)


class Rotated(torch.nn.Module):
    """One attention with rotary embedding in a residual stream."""

    def __init__(self, turn: Callable[[Tensor], Tensor], part: int = 8, swap: bool = False) -> None:
        super().__init__()
        self.turn, self.part, self.swap = turn, part, swap
        self.q, self.k, self.v, self.o = (torch.nn.Linear(16, 16) for _ in range(4))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = (
            layer(x).view(*x.shape[:-1], 2, 8).transpose(1, 2) for layer in (self.q, self.k, self.v)
        )
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
        q = self.rotate(q, cos, sin)
        k = self.rotate(k, sin, cos) if self.swap else self.rotate(k, cos, sin)
        found = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        return x + self.o(found.transpose(1, 2).flatten(2))

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        if self.part == 8:
            return x * cos + self.turn(x) * sin
        first, rest = x[..., : self.part], x[..., self.part :]
        return torch.cat((first * cos + self.turn(first) * sin, rest), -1)


def rotated(turn: Callable[[Tensor], Tensor], part: int = 8, swap: bool = False) -> Program:
    import redpass

    torch.manual_seed(0)
    tables = {name: torch.randn(2, 5, part) for name in ("cos", "sin")}
    inputs = ["x:float32[batch,seq,16]"]
    inputs += [f"{name}:float32[batch,seq,{part}]" for name in tables]
    module = Rotated(turn, part, swap).eval()
    return redpass.load(module, example={"x": torch.randn(2, 5, 16), **tables}, inputs=inputs)


@pytest.mark.parametrize(("turn", "part"), [(halves, 8), (pairs, 8), (halves, 4)])
def test_rotary_spelled_in_each_way_is_lowered(turn: Callable[[Tensor], Tensor], part: int) -> None:
    program = rotated(turn, part)
    after = lowered(program)
    found = [node for node in after.graph.nodes if "rotary" in str(node.target)]
    assert [node.args[4] for node in found] == [turn is pairs]


def test_keys_rotated_by_other_tables_stay() -> None:
    (reason,) = skips_of(rotated(halves, swap=True), "rotary")
    assert "different tables" in reason


def test_what_is_lowered_is_not_found_again() -> None:
    after = run_pass(ASKED, hot_models.paths()).after
    assert not plan_pass(ASKED, after).actions


def test_a_site_gives_its_arguments_at_any_size() -> None:
    program = hot_models.paths()
    site = next(s for s in find_sites(program, Facts(program)) if isinstance(s, Site))
    few, many = (site.values(program, {"batch": 3, "seq": n})[0] for n in (1, 64))
    assert (tuple(few.shape), tuple(many.shape)) == ((3, 1, 24), (3, 64, 24))
    assert few.device.type == "meta"


def test_structure_is_the_only_fact_asked_for() -> None:
    assert ASKED.needs == (structure,)
    assert isinstance(structure(hot_models.paths()), Structure)
    assert replace(ASKED, kernels="auto") == LowerHotPaths()
