"""What users get wrong about passes over widths: told in words, before any work."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch
from building import Builder, aten
from checking import plan_pass

from redpass import rewrite
from redpass.budget.preflight import chosen_passes
from redpass.budget.shares import choose
from redpass.budget.spec import parse_budget
from redpass.data import Batches, Splits
from redpass.errors import PassError, UsageError
from redpass.passes import PASSES
from redpass.passes.prune_channels import PruneChannels
from redpass.passes.spec import as_passes, parse_passes
from redpass.pipeline import optimize
from redpass.program import Program

WIDTHS = (
    "prune_channels", "factor_linears", "cache_latents", "drop_key_channels", "slice_stream",
    "shrink_heads", "cluster_heads", "prune_heads", "merge_key_value_heads", "map_stream",
)  # fmt: skip

WRONG_TYPES = {
    "shares": ("'a half'", "('0.5',)", "(True,)", "None", "((0.5,),)"),
    "multiple": ("2.5", "'8'", "True", "None", "(8,)"),
    "ranks": ("2.5", "('x',)", "(2.5,)"),
    "group_size": ("2.0", "two"),
    "rank": ("1.5", "x", "None"),
    "only": ("3", "(3,)", "None"),
    "kinds": ("3", "(0.5,)"),
    "refit": ("no", "1", "None"),
    "together": ("x", "0"),
    "whiten": ("None",),
    "basis": ("3", "('weights',)"),
    "layout": ("0",),
}
TYPES = [
    (name, option.name, text)
    for name in WIDTHS
    for option in fields(PASSES[name])  # type: ignore[arg-type]
    for text in WRONG_TYPES.get(option.name, ())
]


@pytest.mark.parametrize(("name", "option", "text"), TYPES)
def test_an_option_of_another_type_is_refused_with_an_example(
    name: str, option: str, text: str
) -> None:
    with pytest.raises(UsageError, match=f"'{option}' takes ") as told:
        parse_passes(f"{name}({option}={text})")
    assert told.value.place == name
    assert f"e.g. {option}=" in str(told.value)


def test_an_example_of_an_option_is_one_that_it_takes() -> None:
    for name, option, text in TYPES:
        with pytest.raises(UsageError) as told:
            parse_passes(f"{name}({option}={text})")
        example = str(told.value).partition("e.g. ")[2]
        assert parse_passes(f"{name}({example})")


def test_lists_stand_for_tuples_and_one_for_a_row_of_one() -> None:
    wanted = (PruneChannels(shares=(0.5,)),)
    assert parse_passes("prune_channels(shares=[0.5])") == wanted
    assert parse_passes("prune_channels(shares=0.5)") == wanted
    assert as_passes([PruneChannels(shares=[0.5])]) == wanted  # type: ignore[arg-type]
    assert as_passes(["prune_channels(shares=0.5)", PruneChannels()]) == (*wanted, PruneChannels())


@pytest.mark.parametrize("given", [PruneChannels(shares=0.5), PruneChannels(only="a@8")])  # type: ignore[arg-type]
def test_options_are_checked_of_passes_made_in_python(given: PruneChannels) -> None:
    with pytest.raises(UsageError, match=r"prune_channels: '(shares|only)' takes"):
        chosen_passes([given], None, parse_budget(""))
    with pytest.raises(UsageError, match=r"prune_channels: '(shares|only)' takes"):
        chosen_passes(None, [given], parse_budget("kl<=0.1"))


@pytest.mark.parametrize("given", [PruneChannels, 3, None])
def test_what_is_no_pass_is_refused(given: object) -> None:
    with pytest.raises(UsageError, match="is no pass"):
        as_passes([given])  # type: ignore[list-item]


@pytest.fixture(scope="module")
def plain() -> Program:
    """A gated feed-forward on a stream behind an RMS norm; no attention, no cache."""
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) / shape[-1] ** 0.5

    b = Builder()
    x = b.input("x", "batch", 16)
    x = b.call(aten.linear.default, x, b.weight("first", drawn(16, 16)))
    h = b.call(aten.rms_norm.default, x, [16], b.weight("gain", torch.ones(16)), 1e-6)
    gate, up = (b.call(aten.linear.default, h, b.weight(n, drawn(32, 16))) for n in ("gate", "up"))
    h = b.call(aten.mul.Tensor, b.call(aten.silu.default, gate), up)
    x = b.call(aten.add.Tensor, x, b.call(aten.linear.default, h, b.weight("down", drawn(16, 32))))
    h = b.call(aten.rms_norm.default, x, [16], b.weight("end", torch.ones(16)), 1e-6)
    return b.program(b.call(aten.linear.default, h, b.weight("last", drawn(16, 16))))


SIZES = [
    ("shares=(1.5,)", "a share of 1.5 cannot be left"),
    ("shares=0", "a share of 0 cannot be left"),
    ("shares=-0.5", "a share of -0.5 cannot be left"),
    ("shares=1e999", "a share of inf cannot be left"),
    ("shares=()", "no share is given"),
    ("multiple=0", "nothing can be a multiple of 0"),
    ("multiple=-8", "nothing can be a multiple of -8"),
    ("only=nothing", "is called 'nothing'"),
    ("only='feed-forward@8'", "is called 'feed-forward'"),
    ("only=''", "is called ''"),
    ("only='@'", "is called ''"),
]


@pytest.mark.parametrize(("text", "told"), SIZES)
@pytest.mark.parametrize(
    "name", ["prune_channels", "factor_linears", "cache_latents", "drop_key_channels",
             "slice_stream"]
)  # fmt: skip
def test_sizes_that_cannot_be_are_refused_before_data_are_read(
    plain: Program, name: str, text: str, told: str
) -> None:
    (pass_,) = parse_passes(f"{name}({text})")
    with pytest.raises(UsageError, match=told) as refused:
        plan_pass(pass_, plain)
    assert refused.value.place == name
    assert str(refused.value).count("\n"), "a hint says what to do"


NEAREST = [
    ("prune_channels", "layers.0.feed-forwad@8", "layers.0.feed-forward"),
    ("factor_linears", "donw@4", "down"),
    ("slice_stream", "strem@8", "stream"),
]


@pytest.mark.parametrize(("name", "target", "meant"), NEAREST)
def test_the_nearest_target_is_named(plain: Program, name: str, target: str, meant: str) -> None:
    (pass_,) = parse_passes(f"{name}(only='{target}')")
    with pytest.raises(UsageError, match=f"known: .*{meant}|did you mean '{meant}'"):
        plan_pass(pass_, plain)


ROWS = Batches(({"x": torch.randn(8, 16, generator=torch.Generator().manual_seed(0))},) * 4)


@pytest.mark.parametrize("name", ["prune_channels(multiple=64)", "slice_stream(multiple=64)",
                                  "factor_linears(multiple=64)", "cache_latents"])  # fmt: skip
def test_a_ladder_without_rungs_says_so(plain: Program, name: str) -> None:
    (pass_,) = parse_passes(name)
    plan = plan_pass(pass_, plain, ROWS)
    assert not plan.actions
    assert any("multiple of 64" in s.reason or "keeps no keys" in s.reason for s in plan.skips)


def test_choosing_checks_options_too(plain: Program) -> None:
    with pytest.raises(UsageError, match="'multiple' takes a whole number"):
        choose(plain, [PruneChannels(multiple="8")], share=0.1, data=ROWS)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["prune_channels", "factor_linears(multiple=2)",
                                  "slice_stream(shares=0.5)"])  # fmt: skip
def test_half_precision_is_fitted_and_stays_half(
    plain: Program, name: str, dtype: torch.dtype
) -> None:
    b = Builder()
    x = b.input("x", "batch", 16, dtype=dtype)
    w = {n: b.weight(n, t.to(dtype)) for n, t in plain.weights.items()}
    x = b.call(aten.linear.default, x, w["first"])
    h = b.call(aten.rms_norm.default, x, [16], w["gain"], 1e-6)
    h = b.call(aten.relu.default, b.call(aten.linear.default, h, w["up"]))
    x = b.call(aten.add.Tensor, x, b.call(aten.linear.default, h, w["down"]))
    h = b.call(aten.rms_norm.default, x, [16], w["end"], 1e-6)
    program = b.program(b.call(aten.linear.default, h, w["last"]))
    generator = torch.Generator().manual_seed(1)
    rows = tuple({"x": torch.randn(8, 16, generator=generator).to(dtype)} for _ in range(4))
    (pass_,) = parse_passes(name)
    plan = plan_pass(pass_, program, Batches(rows))
    assert plan.actions
    for action in plan.actions:
        (found,) = rewrite.apply(program, [action])(rows[0]["x"])
        assert found.dtype == dtype
        assert bool(found.isfinite().all())
        assert action.loss is not None
        assert 0 <= action.loss < 1


def test_a_pass_asked_for_by_name_that_can_do_nothing_is_an_error(
    residual: Program, residual_data: Splits
) -> None:
    with pytest.raises(PassError, match=r"no place can be cut: stream: .* 4 more places") as told:
        optimize(
            residual,
            "prune_channels(multiple=64)",
            budget="relative_error<=0.5",
            data=residual_data,
        )
    assert told.value.place == "prune_channels"
    assert told.value.exit_code != 0
