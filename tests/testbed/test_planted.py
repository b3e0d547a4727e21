"""Planted models hold what they say, and their reduced forms prove that it may go."""

import copy
from itertools import pairwise

import pytest
import torch

from testbed import TestbedError, planted
from testbed.planted import branches, neurons


@pytest.fixture(scope="module", params=planted.names())
def case(request):
    return planted.build(request.param)


def test_the_record_is_named_after_its_builder_and_points_at_real_parts(case):
    assert case.name in planted.names()
    parts = {name for name, _ in case.module.named_modules()}
    parts |= {name for name, _ in case.module.named_parameters(remove_duplicate=False)}
    for finding in case.findings:
        assert set(finding.where) <= parts
        assert finding.removable == (finding.why == "")


def test_something_can_be_found_in_every_model(case):
    assert any(finding.removable for finding in case.findings)


def test_building_again_gives_the_same_model(case):
    again = planted.build(case.name)
    assert torch.equal(
        planted.output(again.module, again.inputs), planted.output(case.module, case.inputs)
    )


def test_the_reduced_model_computes_the_same(case):
    if case.reduced is None:
        pytest.skip("plain modules cannot express the reduced form")
    before = planted.output(case.module, case.inputs)
    after = planted.output(case.reduced, case.inputs)
    assert before.std() > 0.1
    if case.exactness == "same bits":
        assert torch.equal(after, before)
    else:
        exact = planted.in_double(case.module, case.inputs)
        assert (after - exact).abs().max().item() <= planted.tolerance(case)


def test_the_reduced_model_is_smaller_unless_it_only_saves_work(case):
    if case.reduced is None:
        pytest.skip("plain modules cannot express the reduced form")
    saves_work_only = {"duplicated_subgraph", "norm_gain_before_linear", "norm_bias_before_linear"}
    # Shared experts and folded norms keep their shapes.
    saves_work_only |= {"permuted_experts"}
    before, after = (_count(module) for module in (case.module, case.reduced))
    assert after < before or (case.name in saves_work_only and after == before)


def _count(module):
    # By storage, since a transposed view is a parameter of its own that costs nothing.
    values = {value.untyped_storage().data_ptr(): value.numel() for value in module.parameters()}
    return sum(values.values())


@pytest.mark.parametrize(("name", "layer"), [("equal_heads_gpt2", 0), ("equal_key_groups", 1)])
def test_heads_of_a_cluster_have_equal_attention(name, layer):
    case = planted.build(name)
    case.module.set_attn_implementation("eager")
    with torch.no_grad():
        maps = case.module(**case.inputs, output_attentions=True).attentions[layer]
    clusters = case.findings[0].detail["clusters"]
    for cluster in clusters:
        for head in cluster:
            assert torch.allclose(maps[:, head], maps[:, cluster[0]], rtol=0, atol=1e-6)
    representatives = [cluster[0] for cluster in clusters]
    for one, other in pairwise(representatives):
        assert (maps[:, one] - maps[:, other]).abs().max() > 0.05


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("rescaled_neurons_relu", "negative scale"),
        ("zero_branches_gpt2", "output bias"),
        ("constant_channels_padded", "zero padding"),
    ],
)
def test_falling_for_the_trap_changes_the_output(name, change):
    case = planted.build(name)
    fallen = _fall(case)
    trap = next(finding for finding in case.findings if not finding.removable)
    assert change in trap.why
    exact = planted.in_double(case.module, case.inputs)
    error = (planted.output(fallen, case.inputs) - exact).abs().max().item()
    assert error > 100 * planted.tolerance(case)


def _fall(case):
    module = copy.deepcopy(case.module)
    if case.name == "rescaled_neurons_relu":
        layer = module.model.decoder.layers[0]
        layer.fc1, layer.fc2 = neurons.merge_neurons(layer.fc1, layer.fc2, {40: (41, -1.0)})
        return module
    if case.name == "zero_branches_gpt2":
        module.transformer.h[1].mlp = branches.Nothing()
        return module
    return neurons.without_channels(case.module, zero=(2, 4), constant={6: 0.75})


def test_low_rank_is_what_the_record_says():
    case = planted.build("rank_deficient")
    for finding in case.findings:
        weight = case.module.get_submodule(finding.where[0]).weight
        values = torch.linalg.svdvals(weight.double())
        rank = finding.detail["rank"]
        assert values[rank] < 1e-6 * values[0] < values[rank - 1]


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(TestbedError, match="no planted model 'nothing'; there are equal_heads, "):
        planted.build("nothing")
