"""Architectures beyond the required ones: right facts, or notes that say what is missing."""

from __future__ import annotations

import pytest
from test_branches import check_drop
from zoo import MORE, load

from redpass.analysis import cost, inspection
from redpass.analysis.structure import structure
from redpass.frontend import random_inputs

ATTENTION, EXPERTS = ("attention", "feed-forward"), ("attention", "experts")

# Name: (kinds of a layer, form, layers, heads, key heads, rotated dimensions, width, activation).
EXPECTED = {
    "phi3": (ATTENTION, "pre-norm", 2, 4, 2, 8, 64, "silu"),
    "qwen2": (ATTENTION, "pre-norm", 2, 4, 2, 8, 64, "silu"),
    "gptj": (ATTENTION, "parallel", 2, 4, 4, 4, 128, "gelu_tanh"),
    "gpt_bigcode": (ATTENTION, "pre-norm", 2, 4, 1, 0, 128, "gelu_tanh"),
    "starcoder2": (ATTENTION, "pre-norm", 2, 4, 2, 8, 64, "gelu_tanh"),
    "cohere": (ATTENTION, "parallel", 2, 4, 2, 8, 64, "silu"),
    "olmo2": (ATTENTION, "output-norm", 2, 4, 2, 8, 64, "silu"),
    "granite": (ATTENTION, "pre-norm", 2, 4, 4, 8, 64, "silu"),
    "gemma2": (ATTENTION, "sandwich", 2, 4, 2, 8, 64, "gelu_tanh"),
    "stablelm": (ATTENTION, "pre-norm", 2, 4, 2, 2, 64, "silu"),
    "mpt": (ATTENTION, "pre-norm", 2, 4, 4, 0, 128, "gelu"),
    "distilbert": (ATTENTION, "post-norm", 2, 4, 4, 0, 64, "gelu"),
    "roberta": (ATTENTION, "post-norm", 2, 4, 4, 0, 64, "gelu"),
    "albert": (ATTENTION, "post-norm", 2, 4, 4, 0, 64, "gelu_tanh"),
    "electra": (ATTENTION, "post-norm", 2, 4, 4, 0, 64, "gelu"),
    "deberta_v2": (ATTENTION, "post-norm", 2, 4, 4, 0, 64, "gelu"),
    "t5_encoder": (ATTENTION, "pre-norm", 2, 4, 4, 0, 64, "relu"),
    "clip_vision": (ATTENTION, "pre-norm", 2, 4, 4, 0, 64, "quick_gelu"),
    "swin": (ATTENTION, "pre-norm", 4, 2, 2, 0, 64, "gelu"),
    "qwen3_moe": (EXPERTS, "pre-norm", 2, 4, 2, 8, 16, "silu"),
    "gpt_oss": (EXPERTS, "pre-norm", 2, 4, 2, 8, 64, "quick_gelu"),
}

# Name: (kinds of all branches, parts of notes that must be there).
WITHOUT_ATTENTION = {
    "convnext": (("mixed",) * 5, ("no attention",)),
    "mamba": (("other",) * 2, ("no attention", "its maps make no attention")),
    "resnet": (("other",) * 2, ("no attention", "projection shortcut")),
}


def marks(name: str) -> object:
    return pytest.param(name, marks=() if name == "resnet" else pytest.mark.slow)


def test_every_model_is_in_one_table() -> None:
    assert EXPECTED.keys() | WITHOUT_ATTENTION.keys() == MORE.keys()


@pytest.mark.parametrize("name", [marks(name) for name in EXPECTED])
def test_facts(name: str) -> None:
    kinds, form, layers, heads, kv_heads, rotary, width, activation = EXPECTED[name]
    found = structure(load(name))
    assert found.notes == ()
    assert tuple(branch.kind for branch in found.branches) == kinds * layers
    assert {branch.form for branch in found.branches} == {form}
    assert len(found.layers) == layers
    first = found.attentions[0]
    assert (first.heads, first.kv_heads) == (heads, kv_heads)
    assert None not in (first.query, first.key, first.value, first.output)
    assert (first.rotary.dims if first.rotary else 0) == rotary
    inner = (found.feed_forwards or found.experts)[0]
    assert (inner.width, inner.activation) == (width, activation)
    assert found.norms


@pytest.mark.parametrize("name", [marks(name) for name in WITHOUT_ATTENTION])
def test_what_is_not_understood_is_said(name: str) -> None:
    kinds, notes = WITHOUT_ATTENTION[name]
    found = structure(load(name))
    assert tuple(branch.kind for branch in found.branches) == kinds
    assert found.attentions == ()
    for part in notes:
        assert any(part in note for note in found.notes), found.notes


@pytest.mark.parametrize("name", [marks(name) for name in MORE])
def test_dropping_a_branch_is_adding_zero(name: str) -> None:
    program = load(name)
    inputs = random_inputs(program, seed=1)
    for branch in structure(program).branches:
        check_drop(program, branch, inputs)


@pytest.mark.parametrize("name", [marks(name) for name in MORE])
def test_costs_and_inspection_hold_for_all(name: str) -> None:
    program = load(name)
    shown = inspection(program)
    assert cost(program).parameters == shown.parameters > 0
    assert shown.rest["flops"] >= 0
    assert len({row.label for row in shown.rows}) == len(shown.rows)


@pytest.mark.slow
def test_shared_weights_are_found_in_each_layer() -> None:
    found = structure(load("albert"))
    first, second = (found.branch(f"layers.{i}.attention") for i in range(2))
    assert first.weights == second.weights
    assert [layer.equal_to for layer in found.layers] == [0, 0]


@pytest.mark.slow
def test_scores_capped_by_tanh_are_noted() -> None:
    assert {attention.softcap for attention in structure(load("gemma2")).attentions} == {50.0}


@pytest.mark.slow
def test_a_scale_given_as_a_constant_tensor_is_read() -> None:
    # DeBERTa divides by the root of three times the head width: content and two positions.
    scale = structure(load("deberta_v2")).attentions[0].scale
    assert scale == pytest.approx((3 * 8) ** -0.5)
