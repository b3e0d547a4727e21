"""The stream made narrower: a turn changes nothing, planted widths are free, controls lose more."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from building import Builder, aten
from checking import applied, plan_pass
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, fx

sys.path.insert(0, str(Path(__file__).parents[1] / "analysis"))
import zoo

import redpass
from redpass import rewrite
from redpass.analysis.cost import total_cost
from redpass.analysis.inspection import DEFAULT_SIZES
from redpass.analysis.rotations.bases import basis
from redpass.analysis.rotations.ladders import Cutter
from redpass.analysis.rotations.sites import streams
from redpass.data import Batches
from redpass.errors import DataError, PassError, UsageError
from redpass.facts import Facts
from redpass.lineage import extend
from redpass.passes.drop_branches import DropBranches
from redpass.passes.map_stream import MapStream
from redpass.passes.prune_channels import PruneChannels
from redpass.passes.refit_projections import RefitProjections
from redpass.passes.slice_stream import SliceStream
from redpass.plan import Action, Narrow, Plan, SetArgument, SetWeight, WeightRef
from redpass.program import Program
from redpass.recipe import needs_data, replay
from redpass.verify.inputs import complete
from redpass.verify.reference import reference

WIDTH = 16


class Drawn:
    """Weights of a planted model: what is written lies in `inside` dimensions of the stream."""

    def __init__(self, seed: int, inside: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        plane = torch.randn(WIDTH, WIDTH, generator=self.generator, dtype=torch.float64)
        self.plane = torch.linalg.qr(plane)[0][:, :inside]

    def matrix(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator) / shape[-1] ** 0.5

    def written(self, *shape: int) -> Tensor:
        """Rows `[..., WIDTH]` inside of the plane."""
        rows = torch.randn(*shape, WIDTH, generator=self.generator)
        return (rows.double() @ self.plane @ self.plane.T).float()


def normed(b: Builder, x: fx.Node, name: str, kind: str, drawn: Drawn) -> fx.Node:
    """A norm with a gain (and a bias): fused, or spelled out."""
    gain = b.weight(f"{name}_gain", 1 + 0.3 * drawn.matrix(WIDTH))
    if kind == "layer":
        bias = b.weight(f"{name}_bias", drawn.matrix(WIDTH))
        return b.call(aten.layer_norm.default, x, [WIDTH], gain, bias, 1e-5)
    if kind == "rms":
        return b.call(aten.rms_norm.default, x, [WIDTH], gain, 1e-6)
    square = b.call(aten.mean.dim, b.call(aten.pow.Tensor_Scalar, x, 2), [-1], True)
    root = b.call(aten.rsqrt.default, b.call(aten.add.Tensor, square, 1e-6))
    unit = b.call(aten.mul.Tensor, x, root)
    # stored around zero, as some models do
    whole = b.call(aten.add.Tensor, gain, 1.0)
    return b.call(aten.mul.Tensor, unit, whole)


def model(kind: str, seed: int = 0, inside: int = WIDTH, layers: int = 2) -> Program:
    """Words, feed-forward branches behind norms of one kind, a head that is the table again."""
    drawn, b = Drawn(seed, inside), Builder()
    ids = b.input("ids", "batch", "seq", dtype=torch.int64)
    table = b.weight("table", drawn.written(40))
    x = b.call(aten.embedding.default, table, ids)
    for layer in range(layers):
        n = normed(b, x, f"norm{layer}", kind, drawn)
        up = b.weight(f"up{layer}", drawn.matrix(24, WIDTH))
        h = b.call(aten.gelu.default, b.call(aten.linear.default, n, up))
        down = b.weight(f"down{layer}", drawn.written(24).T.contiguous())
        bias = b.weight(f"bias{layer}", drawn.written())
        x = b.call(aten.add.Tensor, x, b.call(aten.linear.default, h, down, bias))
    last = normed(b, x, "last", kind, drawn)
    head = b.weight("head", drawn.matrix(40, WIDTH))
    return b.program(b.call(aten.linear.default, last, head))


def words(batches: int = 4, seed: int = 1) -> Batches:
    generator = torch.Generator().manual_seed(seed)
    return Batches(
        tuple({"ids": torch.randint(0, 40, (6, 9), generator=generator)} for _ in range(batches))
    )


def plan(program: Program, data: Batches | None, **options: object) -> Plan:
    return plan_pass(SliceStream(**{"multiple": 1, **options}), program, data)


def off(program: Program, after: Program, values: Mapping[str, Tensor]) -> float:
    """Largest relative error of the outputs, both run in float64."""
    named = {port.name: values[port.name] for port in program.signature.inputs}
    old, new = reference(program, named), reference(after, named)
    pairs = (
        (n.double(), o.double()) for n, o in zip(new, old, strict=True) if o.is_floating_point()
    )
    return max(float((a - b).norm() / b.norm()) for a, b in pairs)


# Weights are kept in float32: what a turn changes is their rounding, a few eps in a few layers.
TURNED = 40 * torch.finfo(torch.float32).eps


@given(
    kind=st.sampled_from(["rms", "layer", "spelled"]),
    seed=st.integers(0, 5),
    refit=st.booleans(),
    random=st.booleans(),
)
def test_a_turn_at_full_width_changes_nothing(kind, seed, refit, random):
    program, data = model(kind, seed), words()
    facts = Facts(program, data)
    [stream] = facts.get(streams)
    cutter = Cutter(facts, stream, data)
    [turned] = cutter.bases([WIDTH], "principal")
    if random and kind != "layer":
        drawn = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(seed))
        turned = basis(torch.linalg.qr(drawn.double())[0], has_mean=False)
    [rung] = cutter.rungs([turned], refit=refit)
    after = applied(program, Action("turn", "here", rung.edits, ""))
    assert off(program, after, words(1, 9)[0]) < TURNED
    assert rung.error < 1e-12


@given(kind=st.sampled_from(["rms", "layer", "spelled"]), inside=st.sampled_from([3, 9]))
def test_a_planted_width_is_free(kind, inside):
    program = model(kind, inside, inside)
    width = inside + (kind == "layer")  # beside the mean over features
    [action] = plan(program, words(), only=(f"stream@{width}",)).actions
    after = applied(program, action)
    assert after.weights["table"].shape == (40, width)
    assert action.loss < 1e-9
    assert off(program, after, words(1, 9)[0]) < TURNED
    [narrower] = plan(program, words(), only=(f"stream@{width - 1}",)).actions
    assert narrower.loss > 1e-4
    assert off(program, applied(program, narrower), words(1, 9)[0]) > 1e-3


def test_nothing_but_widths_changes_where_all_is_linear():
    program = model("rms")
    [action] = plan(program, words(), shares=(0.5,)).actions
    after = applied(program, action)
    calls = [[n.target for n in p.graph.nodes if n.op != "get_attr"] for p in (program, after)]
    assert calls[0] == calls[1]
    assert {v.meta["val"].shape[-1] for v in after.graph.nodes if "norm" in v.name} == {8}
    assert bool((after.weights["norm0_gain_turned"] == 1).all())


@cache
def alike(kind: str) -> Program:
    """A model whose stream mostly lies in half of its dimensions."""
    program = model(kind, 3, 8)
    generator = torch.Generator().manual_seed(4)
    noise = {
        name: 0.1 * weight.std() * torch.randn(weight.shape, generator=generator)
        for name, weight in program.weights.items()
        if name.startswith(("table", "down"))
    }
    weights = {name: weight + noise.get(name, 0) for name, weight in program.weights.items()}
    return replace(program, weights=weights)


@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_principal_directions_lose_less_than_channels_and_random_ones(kind):
    program, data, fresh = alike(kind), words(8), words(1, 9)[0]
    found = {
        name: off(program, applied(program, plan(program, data, shares=(0.6,), basis=name)
                                   .actions[0]), fresh)
        for name in ("principal", "channels")
    }  # fmt: skip
    facts = Facts(program, data)
    [stream] = facts.get(streams)
    cutter = Cutter(facts, stream, data)
    drawn = torch.randn(WIDTH, 10, generator=torch.Generator().manual_seed(0)).double()
    if stream.has_mean:
        drawn = (drawn - drawn.mean(0))[:, :9]
    turned = basis(torch.linalg.qr(drawn)[0], has_mean=stream.has_mean)
    [rung] = cutter.rungs([turned], refit=True)
    random = off(program, applied(program, Action("turn", "here", rung.edits, "")), fresh)
    assert found["principal"] < 0.75 * found["channels"]
    assert found["principal"] < 0.75 * random


def test_a_fit_loses_less_than_none_and_is_told():
    program, data, fresh = alike("rms"), words(8), words(1, 9)[0]
    fitted, bare = (
        plan(program, data, shares=(0.4,), refit=refit).actions[0] for refit in (True, False)
    )
    assert fitted.loss < bare.loss == fitted.evidence["unrepaired"]
    errors = [off(program, applied(program, action), fresh) for action in (fitted, bare)]
    assert errors[0] < 0.97 * errors[1]


def test_predicted_losses_are_what_readers_miss():
    """With a branch that adds nothing the stream is the table: the loss is counted by hand."""
    program, data = model("rms", layers=1), words(8)
    program.weights["down0"].zero_()
    program.weights["bias0"].zero_()
    [action] = plan(program, data, only=("stream@10",), refit=False).actions
    rows = torch.cat([program.weights["table"][b["ids"].flatten()] for b in words(8, 5)]).double()
    units = rows / rows.norm(dim=1, keepdim=True)
    turn = action_matrix(program, action)
    kept = (units @ turn).square().sum() * WIDTH / 10
    assert action.loss == pytest.approx(1 - float(kept) / len(units), rel=0.15)


def action_matrix(program: Program, action: Action) -> Tensor:
    """`R`, read off what became of the table."""
    after = applied(program, action)
    old, new = program.weights["table"].double(), after.weights["table"].double()
    return torch.linalg.lstsq(old, new).solution


@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_savings_are_what_the_program_no_longer_costs(kind):
    program = model(kind)
    actions = plan(program, words()).actions
    assert [a.target for a in actions] == ["stream@14", "stream@13", "stream@11"]
    assert {a.place for a in actions} == {"stream/width"}
    for action in actions:
        before, after = total_cost(program), total_cost(applied(program, action))
        assert action.saving["parameters"] == before.parameters - after.parameters > 0
        assert action.saving["bytes"] == before.bytes - after.bytes
        assert action.saving["flops"] == before.flops(DEFAULT_SIZES) - after.flops(DEFAULT_SIZES)


def test_it_goes_together_with_dropped_branches_in_any_order():
    program, data = model("rms", 3, 8), words()
    [cut] = plan(program, data, only=("stream@10",)).actions
    drops = DropBranches().plan(program, Facts(program, data)).actions
    drop = next(a for a in drops if a.target.startswith("layers.1"))
    both = [applied(program, *pair) for pair in ((cut, drop), (drop, cut))]
    alone = applied(applied(program, drop), *plan(
        applied(program, drop), data, only=("stream@10",)).actions)  # fmt: skip
    values = words(1, 9)[0]
    assert off(both[0], both[1], values) == 0.0
    assert off(alone, both[0], values) < TURNED  # a planted width: both lose nothing


def test_it_goes_together_with_cut_channels_in_any_order():
    program, data = model("rms", 3, 8), words()
    [cut] = plan(program, data, only=("stream@10",)).actions
    [narrow] = PruneChannels(only=("layers.0.feed-forward@16",)).plan(
        program, Facts(program, data)
    ).actions  # fmt: skip
    both = [applied(program, *pair) for pair in ((cut, narrow), (narrow, cut))]
    assert both[0].weights["up0"].shape == (16, 10)
    assert both[0].weights["down0"].shape == (10, 16)
    values = words(1, 9)[0]
    assert off(both[0], both[1], values) < TURNED
    assert off(applied(program, narrow), both[0], values) < TURNED  # the planted turn is free


def test_a_linear_that_reads_and_writes_is_turned_on_both_sides():
    drawn, b = Drawn(0, 8), Builder()
    ids = b.input("ids", "batch", "seq", dtype=torch.int64)
    x = b.call(aten.embedding.default, b.weight("table", drawn.written(40)), ids)
    for layer in range(2):
        n = normed(b, x, f"norm{layer}", "layer", drawn)
        w = b.weight(f"w{layer}", drawn.written(WIDTH).T.contiguous())
        bias = b.weight(f"bias{layer}", drawn.written())
        x = b.call(aten.add.Tensor, x, b.call(aten.linear.default, n, w, bias))
    head = b.weight("head", drawn.matrix(40, WIDTH))
    program = b.program(b.call(aten.linear.default, normed(b, x, "last", "rms", drawn), head))
    [action] = plan(program, words(), only=("stream@9",)).actions
    after = applied(program, action)
    assert after.weights["w0"].shape == (9, 9)
    assert off(program, after, words(1, 9)[0]) < TURNED


def test_two_changes_of_one_axis_or_weight_are_refused():
    program, data = model("rms"), words()
    cut, other = plan(program, data, shares=(0.8, 0.5)).actions
    with pytest.raises(PassError, match="would hide one"):
        rewrite.apply(program, (cut, other))
    narrow = Action("cut", "here", (Narrow("table", 1, torch.tensor([3])),), "")
    for pair, words_ in (((cut, narrow), "turned the axis"), ((narrow, cut), "changed the axis")):
        with pytest.raises(PassError, match=words_):
            rewrite.apply(program, pair)
    table = program.nodes["table"]
    readers = [SetArgument(user.name, "table", WeightRef("new")) for user in table.users]
    swap = (SetWeight("new", torch.zeros(40, WIDTH)), *readers)
    with pytest.raises(PassError, match="in place of one"):
        rewrite.apply(program, (Action("swap", "here", swap, ""), cut))


def test_a_stream_that_is_read_wrongly_is_left_alone():
    program, data = model("rms"), words()
    facts = Facts(program, data)
    [stream] = facts.get(streams)
    assert Cutter(facts, stream, data).fault() == ""
    assert "changes out0 by" in Cutter(facts, replace(stream, units=stream.units[1:]), data).fault()
    missing = replace(stream, turns=stream.turns[1:])
    assert "changes out0 by" in Cutter(facts, missing, data).fault()


@pytest.mark.parametrize(
    ("options", "words_"),
    [
        ({"shares": (0.0,)}, "a share of 0.0 cannot be left"),
        ({"shares": (1.5,)}, "a share of 1.5 cannot be left"),
        ({"multiple": 0}, "nothing can be a multiple of 0"),
        ({"tied": "mixt"}, "no tied is called 'mixt'"),
        ({"basis": "random"}, "no basis is called 'random'"),
        ({"only": ("strem@8",)}, "no stream is called 'strem'"),
        ({"only": ("stream",)}, "does not say how much is left"),
        ({"only": ("stream@0",)}, "leaves 0 features"),
        ({"only": ("stream@17",)}, "leaves 17 features"),
        ({"only": ("stream@-3",)}, "does not say how much is left"),
        ({"only": ("stream@10",), "multiple": 8}, "no multiple of 8"),
    ],
)
def test_bad_options_are_refused_before_any_work(options, words_):
    with pytest.raises(UsageError, match=words_):
        plan(model("rms"), None, **options)


def test_data_is_needed_and_few_tokens_are_told():
    program = model("rms")
    with pytest.raises(DataError, match="no data"):
        plan(program, None)
    few = Batches(({"ids": torch.tensor([[1, 2, 3]])},))
    [action] = plan(program, few, shares=(0.5,)).actions
    assert "only 3 tokens for 16 features" in action.reason
    values = words(1, 9)[0]
    assert all(bool(v.isfinite().all()) for v in applied(program, action)(**values))


def test_places_that_are_left_alone_say_why():
    assert [s.reason for s in plan(model("rms"), words(), shares=(0.9,), multiple=16).skips] == [
        "no smaller width of 16 is a multiple of 16"
    ]
    b = Builder()
    x = b.input("x", "batch", WIDTH)
    w = b.weight("w", torch.randn(WIDTH, WIDTH))
    y = b.call(aten.add.Tensor, x, b.call(aten.linear.default, x, w))
    [skip] = plan(b.program(y), None).skips
    assert skip.reason == "no layer norm or RMS norm reads it"
    b = Builder()
    x = b.input("x", "batch", WIDTH)
    [skip] = plan(b.program(b.call(aten.relu.default, x)), None).skips
    assert skip.reason == "there is no residual stream"


OUT_OF_LINE = {"gemma3": 4, "whisper_encoder": 2, "clip_vision": 3, "dinov2": 2, "vit": 1}
"""Products at the border: norms behind branches, an activation or a norm before the first branch,
what is returned as it is."""


QUICK = ("llama", "gpt2", "vit", "whisper_encoder")
OTHERS = ("qwen3", "opt", "phi", "gpt_neox", "gemma3", "dinov2", "clip_vision", "bloom",
          "t5_encoder", "modernbert", "granite", "qwen3_moe")  # fmt: skip


@pytest.mark.parametrize(
    "name", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)]
)
def test_architectures_turn_exactly_and_get_narrower(name):
    program = zoo.load(name)
    data = Batches((rows(program, 0), rows(program, 1)))
    facts = Facts(program, data)
    [stream] = facts.get(streams)
    if name in OUT_OF_LINE or name in QUICK:
        assert len(stream.crossings) == OUT_OF_LINE.get(name, 0)
    pass_ = SliceStream(shares=(1.0, 0.5))
    found = pass_.plan(program, facts.restrict(pass_.needs))
    assert [a.target for a in found.actions] == ["stream@32", "stream@16"]
    values = rows(program, 7)
    assert off(program, applied(program, found.actions[0]), values) < 2e-5
    after = applied(program, found.actions[1])
    assert off(program, after, values) < 1
    assert total_cost(after).parameters < total_cost(program).parameters
    for norm in stream.norms:
        assert after.nodes[norm.output].meta["val"].shape[-1] == 16


def rows(program: Program, seed: int) -> dict[str, Tensor]:
    """Random words or pictures for a model of the zoo."""
    generator = torch.Generator().manual_seed(seed)
    first = program.signature.inputs[0]
    if first.dtype.is_floating_point:
        sizes = [size if isinstance(size, int) else 4 for size in first.shape]
        return complete(program, {first.name: torch.randn(sizes, generator=generator)})
    ids = torch.randint(1, 99, (4, 12), generator=generator)
    return complete(program, {"input_ids": ids})


@pytest.mark.parametrize("tied", ["mixed", "apart", "whole"])
def test_a_tied_table_is_cut_everywhere_or_left_whole(tied):
    program = zoo.load("gpt2")
    data, values = Batches((rows(program, 0), rows(program, 1))), rows(program, 7)
    full, half = plan(program, data, shares=(1.0, 0.5), tied=tied).actions
    assert off(program, applied(program, full), values) < 2e-5
    after = applied(program, half)
    sizes = [tuple(w.shape) for w in after.weights.values() if w.dim() == 2 and 99 in w.shape]
    assert sizes == {"mixed": [(99, 16)], "apart": [(99, 16)] * 2, "whole": [(99, 32)]}[tied]


def test_a_norm_inside_of_the_sum_is_left_alone():
    program = zoo.load("bert")
    [skip] = plan(program, Batches((rows(program, 0),))).skips
    assert "layer_norm_1 is a norm's result" in skip.reason
    assert "no turn goes through its gain" in skip.reason


def test_borders_that_cost_more_than_the_width_saves_are_left_alone():
    """Norms behind the branches, before they are added: each needs a product of its own."""
    drawn, b = Drawn(0, WIDTH), Builder()
    x = b.input("x", "batch", WIDTH)
    for layer in range(2):
        n = normed(b, x, f"norm{layer}", "rms", drawn)
        h = b.call(aten.linear.default, n, b.weight(f"w{layer}", drawn.matrix(WIDTH, WIDTH)))
        h = normed(b, b.call(aten.tanh.default, h), f"behind{layer}", "rms", drawn)
        x = b.call(aten.add.Tensor, x, h)
    program = b.program(normed(b, x, "last", "rms", drawn))
    data = Batches(({"x": torch.randn(9, WIDTH, generator=torch.Generator().manual_seed(1))},))
    full, *rest = plan(program, data, shares=(1.0,)).actions
    assert off(program, applied(program, full), data[0]) < TURNED
    assert not rest
    found = plan(program, data, shares=(0.8,))
    assert not found.actions
    assert found.skips[0].reason == "4 products at its borders cost more than the width saves"


def test_a_run_takes_it_beside_other_reductions_and_replays(residual, residual_data):
    reduce = [SliceStream(multiple=1), PruneChannels(multiple=1)]
    result = redpass.optimize(residual, reduce, budget="relative_error<=0.6", data=residual_data)
    assert result.record.verdict == "met"
    applied_ = [a.key for a in result.record.actions if a.outcome == "applied"]
    assert sum(key.startswith("slice_stream") for key in applied_) == 1
    assert sum(key.startswith("prune_channels") for key in applied_) > 1
    assert needs_data(result.record.recipe)
    again = replay(residual, result.record.recipe, data=residual_data.calibration)
    x = torch.randn(2, 3, 8)
    assert torch.equal(again(x)[0], result.program(x)[0])


def test_repairs_towards_the_loaded_stream_leave_a_narrower_one_alone(residual, residual_data):
    data = residual_data.calibration
    [cut] = plan(residual, data, only=("stream@12",)).actions
    drops = DropBranches().plan(residual, Facts(residual, data)).actions
    both = (cut, next(a for a in drops if a.target.startswith("layers.2")))
    after = replace(rewrite.apply(residual, both), lineage=extend(residual, residual, both))
    for repair in (RefitProjections(), MapStream()):
        assert not plan_pass(repair, after, data).actions
    reasons = {skip.reason for skip in RefitProjections().plan(after, Facts(after, data)).skips}
    assert reasons == {"the stream is narrower than the loaded model's"}
