"""Coupling groups: what is cut together leaves a model that runs, and the right one."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, fx
from zoo import BUILDERS, MORE, load

from redpass.analysis.axes import length, resolve
from redpass.analysis.couplings import Couplings
from redpass.analysis.flow import Flow
from redpass.analysis.members import CouplingGroup, Member
from redpass.analysis.structure import structure
from redpass.frontend import random_inputs
from redpass.program import Program

STREAM_MEMBERS = {"llama": 21, "gpt2": 24, "opt": 28, "bert": 30, "dit": 48}


def groups(program: Program, kind: str) -> list[CouplingGroup]:
    return [g for g in structure(program).coupling_groups if g.kind == kind]


def indices(member: Member, unit: int) -> list[int]:
    if member.rows:
        return list(member.rows[unit])
    first = member.offset + unit * member.block
    return list(range(first, first + member.block))


def zeroed(program: Program, members: list[Member], unit: int) -> Program:
    weights: dict[str, Tensor] = dict(program.weights)
    for member in members:
        weight = weights[member.weight].clone()
        weight.index_fill_(member.axis, torch.tensor(indices(member, unit)), 0.0)
        weights[member.weight] = weight
    return replace(program, weights=weights)


def same(left: Program, right: Program) -> None:
    inputs = random_inputs(left, seed=3)
    for a, b in zip(left(**inputs), right(**inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi", "modernbert", "bert", "vit"])
def test_a_unit_of_the_inner_width_is_gone_when_its_column_is(name: str) -> None:
    program = load(name)
    for group in groups(program, "inner"):
        column = group.members[-1]
        rows = [m for m in group.members if m is not column]
        # With nothing read, what is written does not matter: the members are one unit.
        same(zeroed(program, [column], 5), zeroed(program, [column, *rows], 5))


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "falcon_new", "phi", "bert"])
def test_a_unit_of_heads_is_gone_when_its_columns_are(name: str) -> None:
    program = load(name)
    for found, group in zip(structure(program).attentions, groups(program, "heads"), strict=True):
        assert group.size == found.kv_heads
        assert found.output is not None
        read = [m for m in group.members if (m.weight, m.axis) == (
            found.output.weight, found.output.axis)]  # fmt: skip
        rest = [m for m in group.members if m not in read]
        without = zeroed(program, read, 1)
        # The caches are outputs too and do change: compare what the model computes.
        inputs = random_inputs(program, seed=3)
        torch.testing.assert_close(
            without(**inputs)[0], zeroed(without, rest, 1)(**inputs)[0], rtol=1e-5, atol=1e-6
        )


def test_channels_can_be_cut_from_a_convolutional_network() -> None:
    program = load("resnet")
    found = structure(program).coupling_groups
    assert [(g.kind, g.size, g.fixed) for g in found] == [
        ("stream", 8, ""), ("stream", 16, ""), ("channels", 8, ""), ("channels", 16, ""),
        ("channels", 16, ""),
    ]  # fmt: skip
    inputs = random_inputs(program, seed=3)
    for group in found:
        small = cut(program, group, unit=2)
        smaller = sum(t.numel() for t in small.weights.values())
        assert smaller < sum(t.numel() for t in program.weights.values())
        assert small(**inputs)[0].shape == program(**inputs)[0].shape


def test_a_cut_channel_is_the_channel_that_nothing_reads() -> None:
    program = load("resnet")
    inputs = random_inputs(program, seed=3)
    for group in groups(program, "channels"):
        readers = [m for m in group.members if m.axis == 1]
        want = zeroed(program, readers, 2)(**inputs)[0]
        torch.testing.assert_close(cut(program, group, 2)(**inputs)[0], want, rtol=1e-5, atol=1e-5)


def cut(program: Program, group: CouplingGroup, unit: int) -> Program:
    weights = dict(program.weights)
    for member in group.members:
        gone = set(indices(member, unit))
        kept = [i for i in range(weights[member.weight].shape[member.axis]) if i not in gone]
        weights[member.weight] = weights[member.weight].index_select(
            member.axis, torch.tensor(kept)
        )
    return replace(program, weights=weights)


@pytest.mark.parametrize("name", STREAM_MEMBERS)
def test_the_stream_is_one_group(name: str) -> None:
    (stream,) = groups(load(name), "stream")
    assert (stream.label, stream.size) == ("stream", 32)
    assert len(stream.members) == STREAM_MEMBERS[name]
    is_encoder = name == "bert"
    assert bool(stream.fixed) == is_encoder, "an encoder's output has the stream's width"


def test_a_mask_with_slices_for_heads_fixes_them() -> None:
    assert all(g.fixed for g in groups(load("falcon_rw"), "heads"))
    assert not any(g.fixed for g in groups(load("llama"), "heads"))


@pytest.mark.parametrize("name", ["llama", "gpt2", "dit", "vit", "bloom", "resnet", "mixtral"])
def test_axes_are_as_long_as_the_value(name: str) -> None:
    assert name in BUILDERS | MORE
    flow = Flow(load(name))
    couplings = Couplings(flow)
    for node in flow.nodes:
        axes = couplings.axes.get(node)
        if isinstance(axes, list) and flow.shape(node) is not None:
            check_axes(flow, node, axes)


def check_axes(flow: Flow, node: fx.Node, axes: list) -> None:  # type: ignore[type-arg]
    sizes = flow.shape(node) or ()
    assert len(axes) == len(sizes), node.format_node()
    for axis, size in zip(axes, sizes, strict=True):
        assert not axis or length(resolve(axis)) == size, node.format_node()
