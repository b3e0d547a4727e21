"""Lowered programs go to files as standard ops: no reader needs redpass or a library of ours."""

from __future__ import annotations

import warnings
from collections import Counter
from dataclasses import replace
from pathlib import Path

import hot_models
import onnx
import pytest
import torch
from building import Builder
from checking import check_numbers, run_pass

from redpass.codegen import ops as kernels_of
from redpass.codegen.decompose import decompose, has_ops
from redpass.codegen.lower import LowerHotPaths
from redpass.codegen.ops.low_rank_linear import OP
from redpass.errors import PassError
from redpass.export import to_onnx, to_pt2
from redpass.program import Program
from redpass.verify.inputs import check_inputs
from redpass.verify.rules import check_rules

ASKED = LowerHotPaths(kernels="triton")


@pytest.fixture(scope="module")
def lowered() -> Program:
    """A Llama with every hot path as a `redpass::` op."""
    return run_pass(ASKED, hot_models.llama()).after


def test_a_program_without_ops_is_returned_as_it_is() -> None:
    program = hot_models.paths()
    assert decompose(program) is program


def test_the_ops_become_aten_again() -> None:
    before = hot_models.paths()
    after = decompose(run_pass(ASKED, before).after)
    assert not has_ops(after)
    check_rules(after)
    for values in check_inputs(before, rounds=2):
        check_numbers(ASKED.exactness, before, after, values)


def test_what_was_lowered_and_written_back_is_found_again() -> None:
    before = hot_models.paths()
    after = decompose(run_pass(ASKED, before).after)
    assert len(run_pass(ASKED, after).plan.actions) == len(run_pass(ASKED, before).plan.actions)


def test_onnx_has_the_operators_it_had_before_lowering(lowered: Program, tmp_path: Path) -> None:
    """Each op vanishes into the standard operator that the exporter has for it."""
    found = []
    for name, program in (("before", hot_models.llama()), ("after", lowered)):
        report = to_onnx(program, tmp_path / f"{name}.onnx")
        assert max(report.worst.values()) <= 1
        nodes = onnx.load(tmp_path / f"{name}.onnx").graph.node
        assert {node.domain for node in nodes} <= {"", "com.microsoft"}
        found.append(Counter(node.op_type for node in nodes))
    for op in ("RotaryEmbedding", "RMSNormalization", "Attention"):
        assert found[0][op] == found[1][op] > 0


def test_a_pt2_loads_in_a_process_that_knows_no_redpass(lowered: Program, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "No complete tensor found", UserWarning)
        to_pt2(lowered, tmp_path / "model.pt2")
    graph = torch.export.load(tmp_path / "model.pt2").graph
    assert not any("redpass" in str(node.target) for node in graph.nodes)


def test_a_reference_that_cannot_be_traced_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels_of.register()
    b = Builder()
    x = b.input("x", "batch", 16)
    down, up = b.weight("down", torch.randn(3, 16)), b.weight("up", torch.randn(8, 3))
    call = torch.ops.redpass.low_rank_linear.default
    program = b.program(b.call(call, x, down, up, None, "none"))

    def strange(x: torch.Tensor, *others: object) -> torch.Tensor:
        return x[:, :8] if float(x.sum()) > 0 else x[:, 8:]

    monkeypatch.setitem(kernels_of.OPS, OP.name, replace(OP, reference=strange))
    with pytest.raises(PassError, match="low_rank_linear_default: its reference cannot be traced"):
        decompose(program)
