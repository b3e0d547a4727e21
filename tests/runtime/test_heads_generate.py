"""Models with fewer heads generate, with caches that are smaller, here and in ONNX Runtime."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import redpass
from redpass import rewrite
from redpass.data import Batches
from redpass.export import to_onnx
from redpass.facts import Facts
from redpass.passes.cluster_heads import ClusterHeads
from redpass.passes.prune_heads import PruneHeads
from redpass.plan import Pass
from redpass.program import Program
from redpass.runtime import CausalLM
from redpass.verify.inputs import complete
from testbed.planted.attention import equal_heads_gpt2, equal_key_groups

PROMPT = torch.tensor([[5, 9, 3, 7], [1, 2, 8, 4]])


TARGETS = {"multi-head": "layers.0.attention@3", "grouped": "layers.1.attention@2"}
"""What is planted, as a rung of `cluster_heads`."""


@pytest.fixture(scope="module")
def planted() -> dict[str, Program]:
    modules = {"multi-head": equal_heads_gpt2().module, "grouped": equal_key_groups().module}
    for module in modules.values():
        module.config.use_cache = True
    return {name: redpass.load(module) for name, module in modules.items()}


def rewritten(program: Program, pass_: Pass) -> Program:
    generator = torch.Generator().manual_seed(0)
    rows = tuple(
        {"input_ids": torch.randint(0, 64, (2, 12), generator=generator)} for _ in range(3)
    )
    facts = Facts(program, Batches(rows, "drawn rows")).restrict(tuple(pass_.needs))
    plan = pass_.plan(program, facts)
    assert len(plan.actions) == 1, plan
    return rewrite.apply(program, plan.actions)


def cached(program: Program) -> int:
    """Numbers of the cache for each position, counted from the tensors that a call returns."""
    inputs = {"input_ids": PROMPT, "attention_mask": torch.ones_like(PROMPT)}
    values = program(**complete(program, inputs))
    return sum(value.numel() for value in values[1:]) // PROMPT.numel()


@pytest.mark.parametrize(
    ("name", "layout"), [("multi-head", "gather"), ("grouped", "gather"), ("grouped", "wide")]
)
def test_planted_heads_share_scores_and_the_same_tokens_come_out(
    name: str, layout: str, planted: dict[str, Program], tmp_path: Path
) -> None:
    program = planted[name]
    after = rewritten(program, ClusterHeads(only=(TARGETS[name],), layout=layout))
    assert cached(program) - cached(after) == 8  # one K head of width 8
    wanted = CausalLM(program).generate(PROMPT, 8)
    assert torch.equal(CausalLM(after).generate(PROMPT, 8), wanted)
    path = tmp_path / "model.onnx"
    to_onnx(after, path)
    assert torch.equal(CausalLM(path, threads=1).generate(PROMPT, 8), wanted)


@pytest.mark.parametrize("name", TARGETS)
def test_pruned_heads_leave_a_smaller_cache_that_files_have_too(
    name: str, planted: dict[str, Program], tmp_path: Path
) -> None:
    program = planted[name]
    after = rewritten(program, PruneHeads(only=("layers.0.attention@1",)))
    assert cached(after) < cached(program)
    tokens = CausalLM(after).generate(PROMPT, 8)
    path = tmp_path / "model.onnx"
    to_onnx(after, path)
    assert torch.equal(CausalLM(path, threads=1).generate(PROMPT, 8), tokens)
