"""`redpass.lower`, and what a run says about kernels."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import hot_models
import pytest
import torch

import redpass
from redpass.cli import main
from redpass.codegen.lower import LowerHotPaths
from redpass.codegen.ops import dispatch
from redpass.errors import UsageError
from redpass.export import to_pt2
from redpass.lowering import on_device
from redpass.program import Program
from redpass.verify.inputs import random_inputs


def test_lower_checks_what_it_did() -> None:
    found = redpass.lower(hot_models.paths(), "triton")
    assert {action.outcome for action in found.actions} == {"applied"}
    assert [record.state for record in found.passes] == ["checked"]
    assert "redpass.gated_feed_forward" in found.program.text
    values = random_inputs(hot_models.paths())
    for old, new in zip(hot_models.paths()(**values), found.program(**values), strict=True):
        torch.testing.assert_close(new, old)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_on_a_cpu_nothing_is_lowered_and_the_reason_is_there() -> None:
    found = redpass.lower(hot_models.paths())
    assert found.program.text == hot_models.paths().text
    assert "no GPU" in found.skips[0].reason


def test_the_environment_chooses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REDPASS_KERNELS", "triton")
    assert redpass.lower(hot_models.paths()).actions
    assert not redpass.lower(hot_models.paths(), "reference").actions
    with pytest.raises(UsageError, match="known: auto, reference, triton"):
        redpass.lower(hot_models.paths(), "cuda")


def test_a_rewrite_that_computes_something_else_is_rolled_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Here the activation is taken for another."""
    monkeypatch.setattr(
        "redpass.codegen.patterns.gated_feed_forward.activation_of", lambda node: "relu"
    )
    found = redpass.lower(hot_models.paths(), "triton")
    outcomes = {action.key.partition(":")[0]: action.outcome for action in found.actions}
    assert outcomes["lower.gated_feed_forward"] == "rolled back"
    assert outcomes["lower.add_norm"] == "applied"
    assert "redpass.gated_feed_forward" not in found.program.text


def test_a_lowered_program_compiles_and_exports_as_one_graph() -> None:
    program = redpass.lower(hot_models.paths(), "triton").program
    values = list(random_inputs(program).values())
    compiled = torch.compile(program.module, fullgraph=True, backend="aot_eager")
    for old, new in zip(program.module(*values), compiled(*values), strict=True):
        torch.testing.assert_close(new, old)


def test_on_a_cpu_the_references_run_without_a_word(recwarn: pytest.WarningsRecorder) -> None:
    program = redpass.lower(hot_models.paths(), "triton").program
    program(**random_inputs(program))
    assert not [w for w in recwarn if issubclass(w.category, dispatch.KernelWarning)]


def calls(program: Program) -> Counter[str]:
    nodes = program.module.graph.nodes
    return Counter(str(node.target) for node in nodes if node.op == "call_function")


def test_on_a_cpu_what_runs_is_what_ran_before() -> None:
    """The very same calls but for views, so lowering costs no time there."""
    before = calls(hot_models.paths())
    found = calls(redpass.lower(hot_models.paths(), "triton").program)
    assert not any("redpass" in name for name in found)
    changed = {name for name in found | before if found[name] != before[name]}
    assert changed <= {"aten.unsqueeze.default", "aten.slice.Tensor"}


def test_a_program_that_moved_to_another_device_keeps_its_ops() -> None:
    program = redpass.lower(hot_models.paths(), "triton").program
    assert "redpass.gated_feed_forward" in on_device(program, "meta").module.code


def test_devices_that_the_graph_names_move_with_the_weights() -> None:
    moved = on_device(hot_models.llama(), "meta")
    assert all(tensor.is_meta for tensor in moved.weights.values())
    named = [v for n in moved.graph.nodes for v in (*n.args, *n.kwargs.values())]
    devices = {str(value) for value in named if isinstance(value, torch.device)}
    assert devices == {"meta"}
    values = random_inputs(hot_models.llama())
    found = moved(**{name: value.to("meta") for name, value in values.items()})
    expected = hot_models.llama()(**values)
    assert [tuple(v.shape) for v in found] == [tuple(v.shape) for v in expected]
    assert not any(tensor.is_meta for tensor in hot_models.llama().weights.values())


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "paths.pt2"
    to_pt2(hot_models.paths(), path)
    return path


def explained(model: Path, capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, list[str]]:
    assert main(["explain", str(model), *words, "--passes", "drop_noops", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    ours = [s for s in data["skips"] if s["pass_name"] == LowerHotPaths.name]
    keys = [a["key"] for a in data["actions"] if a["pass_name"] == LowerHotPaths.name]
    return {"actions": keys, "skips": [skip["reason"] for skip in ours]}


def test_explain_says_where_kernels_would_take_over(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = explained(model, capsys, "--kernels", "triton")
    rules = sorted(key.partition(":")[0] for key in found["actions"])
    assert rules == ["lower.add_norm"] * 2 + ["lower.gated_feed_forward", "lower.low_rank_linear"]
    if not torch.cuda.is_available():
        (reason,) = explained(model, capsys)["skips"]
        assert "no GPU" in reason
        assert "--kernels triton" in reason


def test_a_name_that_is_no_kernel_is_refused(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["explain", str(model), "--kernels", "cuda"]) == 2
    assert "'cuda' are no kernels" in capsys.readouterr().err
