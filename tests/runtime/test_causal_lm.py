"""Greedy tokens of optimised models against transformers' own `generate`."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import redpass
from redpass import export, pipeline
from redpass.errors import LoadError, UsageError
from redpass.facts import Facts
from redpass.passes.drop_branches import DropBranches
from redpass.program import Program
from redpass.rewrite import apply
from redpass.runtime import CausalLM, OnnxModel
from redpass.verify.inputs import random_inputs

transformers = pytest.importorskip("transformers")

COMMON = {
    "vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
WIDE = COMMON | {"intermediate_size": 64}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", WIDE | {"num_key_value_heads": 2}),
    "gpt2": ("GPT2", {"vocab_size": 97, "n_embd": 32, "n_layer": 2, "n_head": 4,
                      "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}),
    "qwen3": ("Qwen3", WIDE | {"num_key_value_heads": 2, "head_dim": 8}),
    "opt": ("OPT", COMMON | {"ffn_dim": 64, "word_embed_proj_dim": 32}),
    "gpt_neox": ("GPTNeoX", WIDE),
}  # fmt: skip
HEADS = {"GPT2": "GPT2LMHeadModel"}


def build(name: str) -> Any:
    logging.getLogger("transformers").setLevel(logging.ERROR)
    kind, options = MODELS[name]
    torch.manual_seed(3)
    config = getattr(transformers, f"{kind}Config")(**options)
    model = getattr(transformers, HEADS.get(kind, f"{kind}ForCausalLM"))(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def prompts() -> tuple[torch.Tensor, torch.Tensor]:
    """Two prompts, the first padded on the left."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(3, 97, (2, 7), generator=generator)
    mask = torch.ones_like(ids)
    ids[0, :3], mask[0, :3] = 0, 0
    return ids, mask


@pytest.fixture(scope="module", params=MODELS)
def pair(request: pytest.FixtureRequest) -> tuple[Any, Program]:
    """A model and its program after the exact passes."""
    model = build(request.param)
    return model, pipeline.optimize(redpass.load(model)).program


def greedy(model: Any, **options: Any) -> torch.Tensor:
    ids, mask = prompts()
    found: torch.Tensor = model.generate(
        ids, attention_mask=mask, do_sample=False, max_new_tokens=12, pad_token_id=0, **options
    )
    return found


def test_greedy_tokens_are_those_of_transformers(pair: tuple[Any, Program], tmp_path: Path) -> None:
    model, program = pair
    ids, mask = prompts()
    wanted = greedy(model, eos_token_id=None)
    assert wanted.shape == (2, 19)
    export.to_onnx(program, tmp_path / "model.onnx")
    for source in (program, tmp_path / "model.onnx"):
        found = CausalLM(source).generate(ids, 12, attention_mask=mask)
        assert torch.equal(found, wanted), source


@pytest.fixture(scope="module")
def llama() -> tuple[Any, Program]:
    model = build("llama")
    return model, redpass.load(model)


def test_it_stops_where_transformers_stops(llama: tuple[Any, Program]) -> None:
    model, program = llama
    ids, mask = prompts()
    free = greedy(model, eos_token_id=None)
    for end in (int(free[0, 9]), int(free[1, 8])):
        wanted = greedy(model, eos_token_id=end)
        found = CausalLM(program).generate(
            ids, 12, attention_mask=mask, eos_token_id=end, pad_token_id=0
        )
        assert torch.equal(found, wanted)


def test_a_pt2_generates_too(llama: tuple[Any, Program], tmp_path: Path) -> None:
    model, program = llama
    ids, mask = prompts()
    export.to_pt2(program, tmp_path / "model.pt2")
    found = CausalLM(tmp_path / "model.pt2").generate(ids, 12, attention_mask=mask)
    assert torch.equal(found, greedy(model, eos_token_id=None))


def test_drawing_is_repeatable_and_follows_top_p(llama: tuple[Any, Program]) -> None:
    lm = CausalLM(llama[1])
    ids, mask = prompts()

    def draw(**options: Any) -> torch.Tensor:
        return lm.generate(ids, 6, attention_mask=mask, do_sample=True, **options)

    assert torch.equal(draw(seed=1), draw(seed=1))
    assert not torch.equal(draw(seed=1, temperature=5.0), draw(seed=2, temperature=5.0))
    likeliest = lm.generate(ids, 6, attention_mask=mask)
    assert torch.equal(draw(top_p=1e-6), likeliest)


Change = Callable[[torch.Tensor, torch.Tensor], dict[str, Any]]
REFUSED: dict[str, tuple[Change, str]] = {
    "right padding": (
        lambda ids, mask: {"input_ids": ids, "attention_mask": mask.flip(1)},
        r"attention_mask: a row is padded on the right\n  pad on the left",
    ),
    "other mask": (
        lambda ids, mask: {"input_ids": ids, "attention_mask": mask[:, 1:]},
        r"attention_mask: found \[2, 6\], expected \[2, 7\]",
    ),
    "no rows": (
        lambda ids, _: {"input_ids": ids[:0]},
        r"input_ids: found torch.int64\[0, 7\], expected int64\[batch, seq\]",
    ),
    "floats": (lambda ids, _: {"input_ids": ids.float()}, "found torch.float32"),
    "temperature": (
        lambda ids, _: {"input_ids": ids, "temperature": 0.0},
        r"temperature 0.0, top_p 1.0\n  temperature is above 0",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_generated_from_is_refused(name: str, llama: tuple[Any, Program]) -> None:
    change, message = REFUSED[name]
    with pytest.raises(UsageError, match=message):
        CausalLM(llama[1]).generate(max_new_tokens=2, **change(*prompts()))


def test_a_model_that_lost_all_attention_still_generates(
    llama: tuple[Any, Program], tmp_path: Path
) -> None:
    program = llama[1]
    labels = ("layers.0.attention", "layers.1.attention")
    bare = apply(program, DropBranches(only=labels).plan(program, Facts(program)).actions)
    assert not bare.signature.state
    ids, mask = prompts()
    wanted = ids
    for _ in range(6):  # each token follows from the one before it alone
        values = random_inputs(bare, {"batch": 2, "seq": 1, "past": 0})
        last = bare(**(values | {"input_ids": wanted[:, -1:]}))[0]
        wanted = torch.cat([wanted, last[:, -1].argmax(-1)[:, None]], dim=1)
    export.write(bare, tmp_path)
    for source in (bare, tmp_path / "model.onnx", tmp_path / "model.pt2"):
        assert torch.equal(CausalLM(source).generate(ids, 6, attention_mask=mask), wanted)


class Masked(torch.nn.Module):
    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
        return {"logits": (input_ids * attention_mask)[..., None].float()}


def test_an_encoder_with_a_mask_is_refused() -> None:
    inputs = [f"{name}:int64[batch,seq]" for name in ("input_ids", "attention_mask")]
    with pytest.raises(UsageError, match="not a causal language model"):
        CausalLM(redpass.load(Masked(), inputs=inputs))


def test_no_tokens_are_refused(llama: tuple[Any, Program]) -> None:
    with pytest.raises(UsageError, match="max_new_tokens: 0 tokens to generate"):
        CausalLM(llama[1]).generate(prompts()[0], 0)


def test_models_without_a_cache_and_other_files_are_refused(
    residual: Program, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="not a causal language model with a cache"):
        CausalLM(residual)
    export.to_onnx(residual, tmp_path / "model.onnx")
    with pytest.raises(UsageError, match=r"model\.onnx: not a causal language model"):
        CausalLM(tmp_path / "model.onnx")
    with pytest.raises(LoadError, match=r"'\.txt' holds no model that generates"):
        CausalLM(tmp_path / "model.txt")


def test_an_onnx_model_names_what_is_wrong(residual: Program, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    with pytest.raises(LoadError, match=r"model\.onnx: no such file"):
        OnnxModel(path)
    path.write_bytes(b"not a model")
    with pytest.raises(LoadError, match=r"model\.onnx: ONNX Runtime refuses it"):
        OnnxModel(path)
    path.unlink()
    export.to_onnx(residual, path)
    with pytest.raises(UsageError, match=r"missing \['x'\], unknown \['y'\]\n  known: x"):
        OnnxModel(path)(y=torch.zeros(1, 2, 8))
