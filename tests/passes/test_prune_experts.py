"""Inner widths of stacked experts: each expert keeps channels of its own."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from checking import applied, plan_pass
from torch import Tensor, fx

import redpass
from redpass import rewrite
from redpass.analysis.cost import total_cost
from redpass.analysis.inspection import DEFAULT_SIZES
from redpass.analysis.structure import structure
from redpass.data import Batches
from redpass.errors import DataError, PassError, UsageError
from redpass.passes.prune_channels import PruneChannels
from redpass.plan import Action, Narrow, Plan
from redpass.program import Program, interpret
from redpass.verify.inputs import complete

WORDS, INNER = 61, 48
SMALL = {"vocab_size": WORDS, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1,
         "eos_token_id": 2}  # fmt: skip
MODELS = {
    "mixtral": ("Mixtral", SMALL | {"num_local_experts": 4, "intermediate_size": INNER}),
    "qwen3_moe": ("Qwen3Moe", SMALL | {
        "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": INNER,
        "intermediate_size": 64, "head_dim": 8, "norm_topk_prob": True}),
}  # fmt: skip


def module(name: str) -> torch.nn.Module:
    logging.getLogger("transformers").setLevel(logging.ERROR)
    kind, options = MODELS[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**options)
    made: torch.nn.Module = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return made


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Program]:
    loaded: dict[str, Program] = {}

    def get(name: str) -> Program:
        if name not in loaded:
            folder = tmp_path_factory.mktemp(name)
            module(name).save_pretrained(folder)
            loaded[name] = redpass.load(folder)
        return loaded[name]

    return get


def texts(batches: int = 8, seed: int = 0, rows: int = 8) -> Batches:
    generator = torch.Generator().manual_seed(seed)
    ids = (torch.randint(3, WORDS, (rows, 16), generator=generator) for _ in range(batches))
    return Batches(tuple({"input_ids": each} for each in ids))


def plan(program: Program, data: Batches | None, **options: object) -> Plan:
    return plan_pass(PruneChannels(**{"kinds": ("experts",), **options}), program, data)  # type: ignore[arg-type]


def stream(program: Program, name: str, values: dict[str, Tensor]) -> Tensor:
    found: dict[str, Tensor] = {}

    def watch(node: fx.Node, value: Tensor) -> Tensor:
        found[node.name] = value
        return value

    inputs = complete(program, values)
    interpret(program, [inputs[port.name] for port in program.signature.inputs], watch)
    return found[name]


def off(program: Program, after: Program, data: Batches) -> float:
    """Squared error behind the experts of the first layer, as a share of the squared stream."""
    (branch,) = (b for b in structure(program).branches if b.label == "layers.0.experts")
    pairs = [[stream(p, branch.after, dict(b)) for p in (program, after)] for b in data]
    lost = sum(float((new - old).square().sum()) for old, new in pairs)
    return lost / sum(float(old.square().sum()) for old, _ in pairs)


def first(found: Plan, count: int) -> Action:
    (action,) = (a for a in found.actions if a.target == f"layers.0.experts@{count}")
    return action


@pytest.mark.parametrize("name", MODELS)
def test_each_expert_keeps_its_own_channels(load: Callable[[str], Program], name: str) -> None:
    program = load(name)
    found = plan(program, texts(), refit=False)
    assert not found.skips or {s.target for s in found.skips}.isdisjoint(
        {"layers.0.experts", "layers.1.experts"}
    )
    action = first(found, 24)
    (cut,) = (e for e in action.edits if isinstance(e, Narrow) and e.axis == 2)
    assert len({tuple(each.tolist()) for each in cut.gone}) > 1
    weights = dict(program.weights)
    zeroed = weights[cut.weight].clone()
    for expert, gone in zip(zeroed, cut.gone, strict=True):
        expert[:, gone] = 0.0
    weights[cut.weight] = zeroed
    after = applied(program, action)
    assert after.weights[cut.weight].shape[2] == 24
    for batch in texts(2, seed=3):
        wanted = replace(program, weights=weights)
        names = [port.name for port in program.signature.inputs]
        inputs = complete(program, dict(batch))
        found_ = after(*(inputs[n] for n in names))[0]
        torch.testing.assert_close(
            found_, wanted(*(inputs[n] for n in names))[0], atol=1e-4, rtol=1e-4
        )


@pytest.mark.parametrize("name", MODELS)
def test_losses_are_predicted_and_a_fit_takes_some_off(
    load: Callable[[str], Program], name: str
) -> None:
    program, fresh = load(name), texts(6, seed=5)
    fitted, bare = (plan(program, texts(24), refit=r, shares=(0.5,)) for r in (True, False))
    lost = {}
    for label, each in (("fitted", fitted), ("bare", bare)):
        action = first(each, 24)
        lost[label] = off(program, applied(program, action), fresh)
        assert lost[label] == pytest.approx(action.loss, rel=0.3)
    assert lost["fitted"] < lost["bare"]
    action = first(fitted, 24)
    before, after = total_cost(program), total_cost(applied(program, action))
    assert action.saving["parameters"] == before.parameters - after.parameters
    assert action.saving["flops"] == before.flops(DEFAULT_SIZES) - after.flops(DEFAULT_SIZES)


def test_padding_does_not_count(load: Callable[[str], Program]) -> None:
    program = load("mixtral")
    data = texts(4)
    padded = Batches(
        tuple(
            {
                "input_ids": torch.cat([torch.zeros(8, 5, dtype=torch.int64), b["input_ids"]], 1),
                "attention_mask": torch.cat(
                    [torch.zeros(8, 5, dtype=torch.int64), torch.ones(8, 16, dtype=torch.int64)], 1
                ),
            }
            for b in data
        )
    )
    one, other = (first(plan(program, d, shares=(0.5,)), 24) for d in (data, padded))
    assert one.evidence["tokens"] == other.evidence["tokens"] == 4 * 8 * 16
    assert one.loss == pytest.approx(other.loss, rel=1e-3)


def test_experts_that_no_token_reaches_are_cut_too_and_told(
    load: Callable[[str], Program],
) -> None:
    program = load("qwen3_moe")
    found = plan(program, texts(1, rows=1), shares=(0.5,))
    action = first(found, 24)
    assert "6 of 6 experts saw fewer tokens than channels" in action.reason
    after = applied(program, *found.actions)
    assert off(program, after, texts(1, seed=7)) < 0.5
    for weight in after.weights.values():
        assert bool(torch.isfinite(weight).all())


def test_what_experts_cannot_be_cut_to_is_refused(load: Callable[[str], Program]) -> None:
    program = load("mixtral")
    with pytest.raises(UsageError, match="leaves 48 channels"):
        plan(program, None, only=("layers.0.experts@48",))
    with pytest.raises(UsageError, match=r"did you mean 'layers\.0\.experts'"):
        plan(program, None, only=("layers.0.expert@16",))
    broken = dict(program.weights)
    (name,) = (n for n in broken if n.endswith("0.mlp.experts.down_proj"))
    (up,) = (n for n in broken if n.endswith("0.mlp.experts.gate_up_proj"))
    broken[up] = torch.full_like(broken[up], float("nan"))
    with pytest.raises(DataError, match=r"layers\.0\.experts.*NaN"):
        plan(replace(program, weights=broken), texts(1))
    action = first(plan(program, texts(2), shares=(0.5,)), 24)
    with pytest.raises(PassError, match="another action"):
        rewrite.apply(program, [action, action])
    assert name in program.weights


def test_sums_that_do_not_fit_are_left_alone(
    load: Callable[[str], Program], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("redpass.analysis.widths.routed.LIMIT", 1000)
    found = plan(load("mixtral"), texts(1))
    assert not found.actions
    assert any("second moments of its experts take" in skip.reason for skip in found.skips)


def test_the_configuration_says_the_width_of_experts(
    load: Callable[[str], Program], tmp_path: Path
) -> None:
    from redpass.export.huggingface import to_huggingface
    from redpass.lineage import extend

    program = load("qwen3_moe")
    actions = plan(program, texts(2), shares=(0.5,), together=True).actions
    assert [a.target for a in actions] == [f"experts.{INNER}@24"]
    after = rewrite.apply(program, actions)
    to_huggingface(replace(after, lineage=extend(program, program, actions)), tmp_path / "hf")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert model.config.moe_intermediate_size == 24
    ids = texts(1, seed=9)[0]["input_ids"]
    inputs = complete(after, {"input_ids": ids})
    mine = after(*(inputs[port.name] for port in after.signature.inputs))[0]
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, mine, atol=1e-3, rtol=1e-3)
