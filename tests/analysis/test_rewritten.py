"""Structure after rewrites: merged projections, dropped branches, graphs with odd details."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn
from zoo import load, program

from redpass.analysis.records import Branch
from redpass.analysis.structure import structure
from redpass.plan import Action, Edit, Insert, Ref, Replace, SetWeight, WeightRef
from redpass.program import Program
from redpass.rewrite import apply

aten = torch.ops.aten


def merged(model: Program, names: list[str]) -> Program:
    """One linear in place of the linears called `names`, which share their input."""
    nodes = [model.nodes[name] for name in names]
    weights = [model.weights[str(node.args[1].target)] for node in nodes]  # type: ignore[union-attr]
    source = nodes[0].args[0].name  # type: ignore[union-attr]
    edits: list[Edit] = [
        SetWeight("merged", torch.cat(weights)),
        Insert("fused", aten.linear.default, (Ref(source), WeightRef("merged")), names[0]),
    ]
    first = 0
    for name, weight in zip(names, weights, strict=True):
        args = (Ref("fused"), -1, first, first + weight.shape[0])
        edits += [Insert(f"{name}_part", aten.slice.Tensor, args, names[0])]
        edits += [Replace(name, f"{name}_part")]
        first += weight.shape[0]
    return apply(model, [Action("test.merge", names[0], tuple(edits), "test")])


def first_of(model: Program, kind: str) -> Branch:
    return next(b for b in structure(model).branches if b.kind == kind)


def test_gate_and_up_in_one_linear_are_told_apart() -> None:
    model = load("llama")
    before = first_of(model, "feed-forward").feed_forward
    assert before is not None
    assert before.gate is not None
    after = first_of(merged(model, [before.gate.node, before.up.node]), "feed-forward").feed_forward
    assert after is not None
    assert after.gate is not None
    assert after.gate.weight == after.up.weight
    assert (after.gate.rows, after.up.rows) == ((range(64),), (range(64, 128),))
    assert (after.width, after.activation) == (before.width, before.activation)


def test_structure_is_the_same_after_a_merge() -> None:
    model = load("qwen3")
    inner = first_of(model, "feed-forward").feed_forward
    assert inner is not None
    assert inner.gate is not None
    found = structure(merged(model, [inner.gate.node, inner.up.node]))
    assert [b.kind for b in found.branches] == [b.kind for b in structure(model).branches]
    assert [b.label for b in found.branches] == [b.label for b in structure(model).branches]


def test_queries_keys_and_values_in_one_linear_are_told_apart() -> None:
    model = load("llama")
    before = first_of(model, "attention").attention
    assert before is not None
    maps = [before.query, before.key, before.value]
    names = [projection.node for projection in maps if projection]
    order = list(model.nodes)
    fused = merged(model, sorted(names, key=order.index))
    after = first_of(fused, "attention").attention
    assert after is not None
    assert (after.heads, after.kv_heads, after.grouping) == (4, 2, "GQA")
    assert after.query is not None
    assert after.key is not None
    assert after.value is not None
    assert after.query.weight == after.key.weight == after.value.weight
    assert after.query.rows == tuple(range(8 * i, 8 * i + 8) for i in range(4))
    assert after.key.rows == (range(32, 40), range(40, 48))
    assert after.value.rows == (range(48, 56), range(56, 64))


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_labels_stay_when_a_branch_is_dropped(name: str) -> None:
    model = load(name)
    first, *rest = structure(model).branches
    edit = Replace(first.join, first.other)
    left = structure(apply(model, [Action("test.drop", first.label, (edit,), "test")]))
    assert [b.label for b in left.branches] == [b.label for b in rest]
    assert [b.kind for b in left.branches] == [b.kind for b in rest]


def test_parallel_branches_can_be_dropped_one_after_the_other() -> None:
    model = load("gpt_neox")
    labels = [b.label for b in structure(model).branches]
    for label in labels[:2]:
        branch = structure(model).branch(label)
        edit = Replace(branch.join, branch.other)
        model = apply(model, [Action("test.drop", label, (edit,), "test")])
    assert [b.label for b in structure(model).branches] == labels[2:]


class Odd(nn.Module):
    """A gelu spelled with an inner add of its own input, and a constant branch of no learning."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.up(x)
        y = 0.5 * y * (1 + torch.tanh(0.79788456 * (y + 0.044715 * y**3)))
        x = x + self.down(y)
        return x + 0.1 * torch.sin(x)


def test_adds_without_learned_maps_are_no_branches() -> None:
    (branch,) = structure(program(Odd(), {"x": torch.randn(2, 3, 8)})).branches
    assert (branch.kind, branch.form) == ("feed-forward", "plain")
    assert branch.feed_forward is not None
    assert branch.feed_forward.activation == "gelu_tanh"


class Plain(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x) * 2


def test_a_graph_without_a_stream_says_so() -> None:
    found = structure(program(Plain(), {"x": torch.randn(2, 8)}))
    assert found.branches == found.layers == found.stream == ()
    assert any("no residual stream" in note for note in found.notes)


class TwoStreams(nn.Module):
    """An encoder and a decoder that looks at it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True)
        self.decoder = nn.TransformerDecoderLayer(16, 2, 32, 0.0, batch_first=True)

    def forward(self, source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return self.decoder(target, self.encoder(source))  # type: ignore[no-any-return]


def test_encoder_and_decoder_are_two_streams() -> None:
    example = {"source": torch.randn(2, 5, 16), "target": torch.randn(2, 3, 16)}
    with torch.enable_grad():
        found = structure(program(TwoStreams(), example))
    assert len(found.streams) == 2
    assert [b.kind for b in found.branches] == [
        "attention", "feed-forward", "attention", "attention", "feed-forward",
    ]  # fmt: skip
    assert [a.is_cross for a in found.attentions] == [False, False, True]
    assert [a.heads for a in found.attentions] == [2, 2, 2]
    assert len({b.label for b in found.branches}) == 5


def test_weights_without_data_give_the_same_structure() -> None:
    model = load("gpt2")
    meta = {name: tensor.to("meta") for name, tensor in model.weights.items()}
    found = structure(replace(model, weights=meta))
    assert found.branches == structure(model).branches
