"""The measures of layers and branches, each against plain NumPy on the eager module's tokens."""

from __future__ import annotations

import importlib
import itertools
import math

import numpy as np
import pytest
import torch
import zoo
from eager import MODELS, Watched, watched

from redpass.analysis import (
    angular_distance,
    block_influence,
    branch_entropy,
    cka,
    macro_influence,
    similarity,
    stream_statistics,
    structure,
)
from redpass.analysis.blocks import blocks
from redpass.data import Batches
from redpass.errors import DataError
from redpass.facts import Facts
from redpass.plan import Action, SetArgument, SetWeight, WeightRef
from redpass.program import Program
from redpass.rewrite import apply
from redpass.verify.inputs import random_inputs

module = importlib.import_module("redpass.analysis.stream_statistics")

CLOSE = {"rel": 1e-4, "abs": 2e-5}


@pytest.fixture(params=list(MODELS))
def model(request: pytest.FixtureRequest) -> Watched:
    return watched(request.param)


def cosines(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return (x * y).sum(1) / np.linalg.norm(x, axis=1) / np.linalg.norm(y, axis=1)


def linear_cka(x: np.ndarray, y: np.ndarray) -> float:
    x, y = x - x.mean(0), y - y.mean(0)
    norms = np.linalg.norm(x.T @ x) * np.linalg.norm(y.T @ y)
    return float(np.linalg.norm(x.T @ y) ** 2 / norms)


def test_block_influence_is_that_of_the_eager_layers(model: Watched) -> None:
    stages = model.stages()
    found = model.facts().get(block_influence)
    want = [1 - cosines(a, b).mean() for a, b in itertools.pairwise(stages)]
    assert list(found.layers) == ["layers.0", "layers.1", "layers.2"]
    assert list(found.layers.values()) == pytest.approx(want, **CLOSE)
    assert found.reason == ""


def test_angular_distance_is_that_of_the_eager_layers(model: Watched) -> None:
    stages = model.stages()
    found = model.facts().get(angular_distance)
    for start in range(3):
        for length in range(1, 4):
            figure = found.distances[start][length - 1]
            if start + length > 3:
                assert math.isnan(figure)
                continue
            angles = np.arccos(cosines(stages[start], stages[start + length])) / np.pi
            assert figure == pytest.approx(angles.mean(), **CLOSE)


def test_nearest_span_is_the_one_with_the_least_distance() -> None:
    found = watched("llama").facts().get(angular_distance)
    firsts = [row[0] for row in found.distances]
    assert found.nearest(1) == firsts.index(min(firsts))
    assert found.nearest(3) == 0
    assert found.nearest(4) is None
    with pytest.raises(ValueError, match="at least one layer"):
        found.nearest(0)


def test_cka_is_that_of_the_eager_layers(model: Watched) -> None:
    stages = model.stages()
    found = model.facts().get(cka)
    want = [[linear_cka(x, y) for y in stages] for x in stages]
    assert found.labels == ("input", "after layers.0", "after layers.1", "after layers.2")
    assert found.estimator == "exact"
    assert np.array(found.values) == pytest.approx(np.array(want), **CLOSE)


def test_cka_on_stretches_is_near_the_exact_one(monkeypatch: pytest.MonkeyPatch) -> None:
    model = watched("gpt_neox")
    monkeypatch.setattr(module, "EXACT_BYTES", 0)
    estimated = model.facts().get(cka)
    monkeypatch.undo()
    exact = model.facts().get(cka)
    assert estimated.estimator == "stretches of 256 tokens"
    assert np.array(estimated.values).diagonal() == pytest.approx(1.0)
    assert np.abs(np.array(estimated.values) - np.array(exact.values)).max() < 0.25


def test_branch_similarity_is_that_of_the_eager_branches(model: Watched) -> None:
    measured = model.facts().get(similarity).branches
    for kind, parts in (("attention", model.parts(0)), ("feed-forward", model.parts(1))):
        totals = eager_totals(model, kind)
        for number, (part, total) in enumerate(zip(parts, totals, strict=True)):
            found = measured[f"layers.{number}.{kind}"]
            assert found.cosine == pytest.approx(cosines(total - part, total).mean(), **CLOSE)
            ratio = np.linalg.norm(part, axis=1) / np.linalg.norm(total, axis=1)
            assert found.relative_norm == pytest.approx(ratio.mean(), **CLOSE)
            assert found.tokens == len(part)


def eager_totals(model: Watched, kind: str) -> list[np.ndarray]:
    """The stream with a branch's contribution, before any norm behind the add."""
    stages, attention, inner = model.stages(), model.parts(0), model.parts(1)
    if model is watched("gpt_neox"):
        return stages[1:]
    if model is watched("bert"):
        middle = [x + a for x, a in zip(stages, attention, strict=False)]
        if kind == "attention":
            return middle
        norms = [layer.attention.output.LayerNorm for layer in model.stack()]
        with torch.no_grad():
            normed = [
                n(torch.tensor(x).float()).numpy() for n, x in zip(norms, middle, strict=True)
            ]
        return [x + f for x, f in zip(normed, inner, strict=True)]
    middle = [x + a for x, a in zip(stages, attention, strict=False)]
    return middle if kind == "attention" else stages[1:]


def test_entropy_is_that_of_gaussian_features(model: Watched) -> None:
    found = model.facts().get(branch_entropy)
    entropies = []
    for kind, parts in (("attention", model.parts(0)), ("feed-forward", model.parts(1))):
        want = [float(np.log(2 * np.pi * np.e * part.var(0)).mean() / 2) for part in parts]
        labels = [f"layers.{number}.{kind}" for number in range(3)]
        assert [found.branches[label] for label in labels] == pytest.approx(want, **CLOSE)
        entropies.append(want)
    want = [a - f for a, f in zip(*entropies, strict=True)]
    assert list(found.layers.values()) == pytest.approx(want, **CLOSE)


def test_macro_influence_is_that_of_the_eager_model_without_the_layer(model: Watched) -> None:
    end = model.stages()[-1]
    found = model.facts().get(macro_influence)
    want = [1 - cosines(end, model.end_without(number)).mean() for number in range(3)]
    assert list(found.layers.values()) == pytest.approx(want, **CLOSE)
    last = model.facts().get(block_influence).layers["layers.2"]
    assert found.layers["layers.2"] == pytest.approx(last, abs=1e-5)


def test_padding_changes_nothing() -> None:
    """Rows cut to what is no padding give the same figures as padded ones, on both sides."""
    model = watched("llama")
    rows = []
    for batch in model.data:
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
            ids = ids[mask.bool()][None]
            rows.append({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    whole, cut = model.facts(), model.facts(Batches(tuple(rows)))
    for analysis in (block_influence, macro_influence):
        want = list(cut.get(analysis).layers.values())
        assert list(whole.get(analysis).layers.values()) == pytest.approx(want, abs=1e-5)
    assert whole.get(stream_statistics).stages[0].tokens == sum(
        row["input_ids"].numel() for row in rows
    )


def silenced(program: Program, number: int) -> Program:
    """The program with all zeros in the output weights of layer `number`."""
    edits = []
    for branch in structure(program).branches:
        if branch.layer == number:
            inner = branch.attention.output if branch.attention else branch.feed_forward.down
            name = f"zeros_{branch.kind}"
            weights = {str(n.target): n for n in program.weight_nodes}
            for weight in filter(None, (inner.weight, inner.bias)):
                zero = torch.zeros_like(program.weights[weight])
                edits += [SetWeight(f"{name}_{weight}", zero)]
                old = weights[weight]
                edits += [
                    SetArgument(user.name, old.name, WeightRef(f"{name}_{weight}"))
                    for user in old.users
                ]
    return apply(program, [Action("test", "zero", tuple(edits), "zeros")])


def test_layer_that_adds_nothing_measures_as_such() -> None:
    model = watched("llama")
    facts = Facts(silenced(model.program, 1), model.data)
    assert facts.get(block_influence).layers["layers.1"] == pytest.approx(0.0, abs=1e-9)
    assert facts.get(macro_influence).layers["layers.1"] == pytest.approx(0.0, abs=1e-9)
    assert facts.get(angular_distance).distances[1][0] < 1e-7
    assert facts.get(angular_distance).nearest(1) == 1
    assert facts.get(cka).values[1][2] == pytest.approx(1.0, abs=1e-9)
    lowest = math.log(2 * math.pi * math.e * module.LEAST_VARIANCE) / 2
    assert facts.get(branch_entropy).branches["layers.1.attention"] == pytest.approx(lowest)
    assert facts.get(similarity).branches["layers.1.attention"].cosine == pytest.approx(1.0)


def test_one_run_serves_all_measures(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = []
    collect = module.collect
    monkeypatch.setattr(module, "collect", lambda *a, **k: runs.append(1) or collect(*a, **k))
    facts = watched("bert").facts()
    for analysis in (similarity, block_influence, angular_distance, cka, branch_entropy):
        facts.get(analysis)
    assert len(runs) == 1


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_layer_with_values_that_are_no_numbers_is_named(bad: float) -> None:
    model = watched("llama")
    branch = structure(model.program).branch("layers.1.feed-forward")
    name = branch.feed_forward.down.weight
    node = next(n for n in model.program.weight_nodes if n.target == name)
    spoilt = model.program.weights[name].clone()
    spoilt[3] = bad
    users = [SetArgument(user.name, node.name, WeightRef("spoilt")) for user in node.users]
    action = Action("test", "spoil", (SetWeight("spoilt", spoilt), *users), "spoilt")
    facts = Facts(apply(model.program, [action]), model.data)
    with pytest.raises(DataError, match=r"layers\.1\.feed-forward: .*NaN or infinite"):
        facts.get(block_influence)
    with pytest.raises(DataError, match=r"layers\.\d: .*NaN or infinite"):
        facts.get(macro_influence)


def test_too_few_tokens_are_refused_where_a_measure_needs_more() -> None:
    model = watched("gpt_neox")
    row = {"input_ids": torch.tensor([[5]]), "attention_mask": torch.tensor([[1]])}
    facts = model.facts(Batches((row,), "one.txt"))
    assert facts.get(block_influence).layers.keys() == {"layers.0", "layers.1", "layers.2"}
    with pytest.raises(DataError, match=r"one\.txt: CKA needs 4 tokens .* there are 1"):
        facts.get(cka)
    with pytest.raises(DataError, match=r"entropy needs 2 tokens .* there are 1"):
        facts.get(branch_entropy)


def test_rows_of_padding_alone_are_refused() -> None:
    model = watched("bert")
    row = {"input_ids": torch.tensor([[5, 6]]), "attention_mask": torch.tensor([[0, 0]])}
    with pytest.raises(DataError, match="every token is padding"):
        model.facts(Batches((row,))).get(block_influence)


class Layered(torch.nn.Module):
    """Maps of which `skips` have a skip connection."""

    def __init__(self, skips: int) -> None:
        super().__init__()
        self.maps = torch.nn.ModuleList(torch.nn.Linear(6, 6) for _ in range(2))
        self.skips = skips

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for number, one in enumerate(self.maps):
            x = torch.tanh(one(x)) + (x if number < self.skips else 0)
        return x


def layered(skips: int) -> Facts:
    torch.manual_seed(0)
    example = {"x": torch.randn(5, 6)}
    return Facts(zoo.program(Layered(skips), example), Batches((example,)))


MEASURES = (block_influence, macro_influence, angular_distance, cka, branch_entropy)


@pytest.mark.parametrize("measure", MEASURES)
def test_program_without_a_stream_gives_nothing_and_the_reason(measure: object) -> None:
    facts = layered(0)
    assert "no residual stream" in facts.get(measure).reason
    assert facts.get(similarity).branches == {}
    assert facts.get(similarity).cosines == ()
    assert facts.get(stream_statistics).stages == ()


@pytest.mark.parametrize("measure", MEASURES)
def test_program_without_repeated_layers_gives_branches_alone(measure: object) -> None:
    facts = layered(1)
    assert "no layer repeats" in facts.get(measure).reason
    assert len(facts.get(similarity).branches) == 1


@pytest.mark.parametrize("name", ["opt", "resnet"])
def test_other_architectures_have_figures_for_every_layer(name: str) -> None:
    """A stream that is flattened on the way, and one of images with channels second."""
    program = zoo.load(name)
    sizes = {"batch": 2, "seq": 6, "past": 0}
    inputs = random_inputs(program, {k: v for k, v in sizes.items() if k in program.signature.dims})
    facts = Facts(program, Batches((inputs,)))
    labels = {block.label for block in facts.get(blocks)}
    for analysis in (block_influence, macro_influence):
        found = facts.get(analysis)
        assert found.layers.keys() == labels
        assert not found.skips
        assert all(0 < value < 2 for value in found.layers.values())
    assert all(facts.get(cka).values[i][i] == pytest.approx(1.0) for i in range(len(labels)))


def test_stream_that_changes_its_width_has_no_cosine_across() -> None:
    program = zoo.load("resnet")
    facts = Facts(program, Batches((random_inputs(program, {"batch": 2}),)))
    distances = facts.get(angular_distance).distances
    assert distances[0][0] > 0
    assert math.isnan(distances[0][1])
    assert math.isnan(facts.get(similarity).cosines[0][-1])
