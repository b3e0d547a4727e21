"""Language models that lost attentions or layers generate as they compute without a cache."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "analysis"))
import zoo

from redpass import rewrite
from redpass.analysis import structure
from redpass.analysis.blocks import blocks
from redpass.facts import Facts
from redpass.passes.drop_branches import DropBranches
from redpass.passes.drop_layers import DropLayers
from redpass.passes.reuse_layers import ReuseLayers
from redpass.program import Program
from redpass.runtime import CausalLM
from redpass.state import renumber_state
from redpass.verify.inputs import complete
from redpass.verify.rules import check_rules

MODELS = ("llama", "gpt2", "gpt_neox")
PROMPT = torch.tensor([[5, 17, 3, 40], [8, 2, 61, 7]])


def changed(name: str, what: str) -> Program:
    program = zoo.load(name)
    facts = Facts(program)
    attention = next(b for b in facts.get(structure).branches if b.kind == "attention")
    first, second = (block.label for block in facts.get(blocks))
    passes = {
        "no first attention": DropBranches(only=(attention.label,)),
        "no first layer": DropLayers(only=(first,)),
        "no last layer": DropLayers(only=(second,)),
        "first layer again": ReuseLayers(only=(f"{second}={first}",)),
    }
    plan = passes[what].plan(program, facts)
    assert plan.actions, [skip.reason for skip in plan.skips]
    after = renumber_state(rewrite.apply(program, plan.actions))
    check_rules(after)
    return after


def without_cache(program: Program, ids: torch.Tensor, count: int) -> torch.Tensor:
    place = [port.name for port in program.signature.outputs].index("logits")
    for _ in range(count):
        logits = program(**complete(program, {"input_ids": ids}))[place]
        ids = torch.cat([ids, logits[:, -1].argmax(-1, keepdim=True)], 1)
    return ids


@pytest.mark.parametrize("what", ["no first attention", "no first layer", "no last layer"])
@pytest.mark.parametrize("name", MODELS)
def test_generate_after_dropping(name, what):
    program = changed(name, what)
    parts = [f"past_key_values.0.{part}" for part in ("key", "value")]
    assert [pair[0] for pair in program.signature.state] == parts
    assert torch.equal(CausalLM(program).generate(PROMPT, 6), without_cache(program, PROMPT, 6))


@pytest.mark.parametrize("name", MODELS)
def test_a_layer_that_runs_again_has_a_cache_entry_of_its_own(name):
    program = changed(name, "first layer again")
    assert len(program.signature.state) == 4
    assert len(program.weights) < len(zoo.load(name).weights)
    assert torch.equal(CausalLM(program).generate(PROMPT, 6), without_cache(program, PROMPT, 6))


def test_the_onnx_file_has_the_numbers_without_a_gap(tmp_path):
    from redpass import export

    program = changed("llama", "no first attention")
    export.write(program, tmp_path, ("onnx",))
    found = CausalLM(tmp_path / "model.onnx").generate(PROMPT, 6)
    assert torch.equal(found, without_cache(program, PROMPT, 6))
