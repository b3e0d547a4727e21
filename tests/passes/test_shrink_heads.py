"""Narrower heads: full width changes nothing, planted widths are free, CLOVER beats magnitude."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from checking import applied
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "analysis"))
import zoo

from redpass.analysis.cost import total_cost
from redpass.analysis.heads.clover import BASES
from redpass.analysis.heads.savings import kinds_of
from redpass.analysis.heads.widths import head_shapes, head_widths
from redpass.analysis.inspection import DEFAULT_SIZES
from redpass.data import Batches
from redpass.errors import DataError, UsageError
from redpass.facts import Facts
from redpass.passes.shrink_heads import ShrinkHeads
from redpass.plan import Action, Plan
from redpass.program import Program
from redpass.verify.inputs import complete


def _rows(program: Program, seed: int = 0, length: int = 12) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 99, (4, length), generator=generator)
    return complete(program, {"input_ids": ids})


def _facts(program: Program) -> Facts:
    return Facts(program, Batches((_rows(program, 0), _rows(program, 1))))


def _outputs(program: Program, seed: int = 7) -> list[Tensor]:
    """What the program returns, without its cache."""
    state = {name for _, name in program.signature.state}
    outputs = program(**_rows(program, seed))
    ports = program.signature.outputs
    return [out for out, port in zip(outputs, ports, strict=True) if port.name not in state]


def _gap(after: Program, before: Program) -> float:
    pairs = zip(_outputs(after), _outputs(before), strict=True)
    return max(float((a - b).norm() / b.norm()) for a, b in pairs)


def _plan(program: Program, facts: Facts | None = None, **options: object) -> Plan:
    pass_ = ShrinkHeads(**{"multiple": 1, **options})
    return pass_.plan(program, (facts or _facts(program)).restrict(tuple(pass_.needs)))


class _Measured(dict[str, Facts]):
    """Facts of one model a form: fused, grouped with rotary positions, an encoder, separate."""

    def __missing__(self, name: str) -> Facts:
        self[name] = _facts(zoo.load(name))
        return self[name]


@pytest.fixture(scope="module")
def measured() -> _Measured:
    """Models that are traced and measured when they are asked for."""
    return _Measured()


@pytest.mark.parametrize(
    ("name", "basis", "refit"),
    [
        ("gpt2", "activations", True),
        ("gpt2", "magnitude", False),
        ("llama", "activations", False),
        ("bert", "weights", True),
        ("opt", "magnitude", True),
    ],
)
def test_full_width_leaves_the_output_as_it_is(
    name: str, basis: str, refit: bool, measured: dict[str, Facts]
) -> None:
    facts = measured[name]
    label, found = next(iter(facts.get(head_widths).items()))
    kind = kinds_of(facts.get(head_shapes).kinds[label])[-1]
    edits, loss = found.cut(kind, 8, basis, refit=refit)
    after = applied(facts.program, Action("test", label, edits, ""))
    assert loss < 1e-9
    assert _gap(after, facts.program) < 1e-5


def test_what_can_be_cut_depends_on_what_stands_between(measured: dict[str, Facts]) -> None:
    kinds = {name: measured[name].get(head_shapes).kinds for name in ("gpt2", "llama")}
    assert set(kinds["gpt2"].values()) == {("values", "keys")}
    assert set(kinds["llama"].values()) == {("values", "keys")}
    plan = _plan(measured["llama"].program, measured["llama"])
    assert not plan.skips
    assert {action.target.split("@")[0] for action in plan.actions} == {
        f"layers.{n}.attention.{kind}" for n in (0, 1) for kind in ("values", "keys")
    }


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_savings_are_what_is_saved_and_the_cache_shrinks(
    name: str, measured: dict[str, Facts]
) -> None:
    program = measured[name].program
    plan = _plan(program, measured[name])
    assert [a.loss for a in plan.actions] == sorted(a.loss for a in plan.actions)
    before = total_cost(program)
    for action in plan.actions[-2:]:
        after = total_cost(applied(program, action))
        assert action.saving == {
            "parameters": before.parameters - after.parameters,
            "bytes": before.bytes - after.bytes,
            "flops": before.flops(DEFAULT_SIZES) - after.flops(DEFAULT_SIZES),
            "kv_bytes_per_token": before.kv_bytes_per_token - after.kv_bytes_per_token,
        }
        assert action.saving["kv_bytes_per_token"] > 0


def test_widths_of_one_fused_linear_are_rivals_and_others_go_together(
    measured: dict[str, Facts],
) -> None:
    fused = {a.place for a in _plan(measured["gpt2"].program, measured["gpt2"]).actions}
    assert fused == {f"layers.{n}.attention/head-width" for n in (0, 1)}
    program = measured["opt"].program
    plan = _plan(program, measured["opt"], shares=(0.75,))
    apart = [a for a in plan.actions if not a.place.endswith("heads-width")]
    assert len({a.place for a in apart}) == len(apart) == 4
    after = applied(program, *apart)
    assert _gap(after, program) < 0.2
    targets = tuple(action.target for action in apart)
    again = applied(program, *_plan(program, measured["opt"], only=targets).actions)
    assert _gap(again, after) < 1e-5


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_directions_beat_channels_and_a_refit_beats_none(
    name: str, measured: dict[str, Facts]
) -> None:
    """In the error that the heads put into the stream, which is what is predicted."""
    facts = measured[name]
    for found in facts.get(head_widths).values():
        for width in (6, 4, 2):
            losses = {
                (basis, refit): found.cut("values", width, basis, refit=refit)[1]
                for basis in BASES
                for refit in (True, False)
            }
            assert losses["activations", False] < losses["magnitude", False]
            assert losses["activations", True] < losses["magnitude", True]
            for basis in BASES:
                assert losses[basis, True] <= losses[basis, False] * (1 + 1e-6)


def test_predicted_losses_of_values_are_the_error_in_the_stream(
    measured: dict[str, Facts],
) -> None:
    program = measured["gpt2"].program
    facts = Facts(program, Batches((_rows(program, 0, 256),)))
    label, found = next(iter(facts.get(head_widths).items()))
    edits, loss = found.cut("values", 4, "activations", refit=True)
    after = applied(facts.program, Action("test", label, edits, ""))
    stream = found.site.branch.after
    gaps, whole = 0.0, 0.0
    for batch in facts.data():
        old, new = _value(facts.program, stream, batch), _value(after, stream, batch)
        gaps += float((old - new).square().sum())
        whole += float(old.square().sum())
    assert 0.6 * loss < gaps / whole < 1.2 * loss


def _value(program: Program, name: str, batch: dict[str, Tensor]) -> Tensor:
    from redpass.program import interpret

    seen: dict[str, Tensor] = {}

    def watch(node, value):
        if node.name == name:
            seen[name] = value
        return value

    given = complete(program, {"input_ids": batch["input_ids"]})
    interpret(program, [given[port.name] for port in program.signature.inputs], watch)
    return seen[name]


def test_planted_narrow_values_are_found_and_cost_nothing(measured: dict[str, Facts]) -> None:
    """Values of rank three in each head of eight channels."""
    program = measured["opt"].program
    site = measured["opt"].get(head_widths)["layers.0.attention"].site
    name = site.sides["value"].linear.weight
    weight = program.weights[name].clone().unflatten(0, (4, 8)).double()
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    values[:, 3:] = 0.0
    weight = (left * values.unsqueeze(1)) @ right
    planted = replace(
        program, weights={**program.weights, name: weight.flatten(0, 1).to(torch.float32)}
    )
    facts = _facts(planted)
    for basis in ("weights", "activations"):
        plan = _plan(planted, facts, basis=basis, shares=(0.75,))
        action = next(a for a in plan.actions if a.target.startswith("layers.0.attention.values"))
        assert action.target == "layers.0.attention.values@3"
        assert _gap(applied(planted, action), planted) < 1e-4


def test_data_are_needed_and_few_tokens_do(measured: dict[str, Facts]) -> None:
    program = measured["llama"].program
    with pytest.raises(DataError, match="--data"):
        _plan(program, Facts(program))
    few = Facts(program, Batches((_rows(program, 3, length=1),)))
    plan = _plan(program, few, shares=(0.75,))
    assert all(action.evidence["tokens"] == 4 for action in plan.actions)
    assert _gap(applied(program, *plan.actions), program) < 1.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shares": (1.5,)}, "a share of 1.5"),
        ({"multiple": 0}, "a multiple of 0"),
        ({"basis": "guess"}, "no basis is called"),
        ({"only": ("layers.0.attention.values@8",)}, "width from 1 to 7"),
        ({"only": ("layers.0.attention.values@0",)}, "width from 1 to 7"),
        ({"only": ("layers.0.attention.keys@5",)}, "in pairs"),
        ({"only": ("layers.0.attention.scores@4",)}, "no heads are called"),
    ],
)
def test_bad_options_are_refused_before_any_data_are_read(
    options: dict[str, object], message: str, measured: dict[str, Facts]
) -> None:
    program = measured["llama"].program
    with pytest.raises(UsageError, match=message):
        _plan(program, Facts(program), **options)
