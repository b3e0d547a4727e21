"""Smaller caches in use: greedy generation, ONNX Runtime, a .pt2 and back."""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "passes"))
from caching import decode, language_model, plan_with

import redpass
from redpass import rewrite
from redpass.codegen.lower import find_sites
from redpass.export import to_onnx, to_pt2
from redpass.facts import Facts
from redpass.passes.cache_latents import CacheLatents
from redpass.plan import Skip
from redpass.program import Program
from redpass.runtime import CausalLM

PROMPT = torch.tensor([[0, 5, 17, 3, 40], [8, 2, 61, 7, 9]])
MASK = torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]])
GROUPED = {"keys": "rebuilt", "group_size": 2}
WINDOW = {"keys": "rebuilt", "window": 6}


@cache
def cut(name: str, share: float, **options: Any) -> Program:
    program = language_model(name)
    pass_ = CacheLatents(shares=(share,), multiple=1, **options)
    return rewrite.apply(program, plan_with(pass_, program).actions)


def written(source: Program | Path) -> torch.Tensor:
    return CausalLM(source).generate(PROMPT, 8, attention_mask=MASK)


@pytest.mark.parametrize(
    ("name", "options"),
    [("gpt2", {}), ("llama", {}), ("llama", GROUPED), ("llama", WINDOW)],
    ids=str,
)
def test_greedy_generation_is_the_same_at_full_rank(name: str, options: dict[str, Any]) -> None:
    assert torch.equal(written(cut(name, 1.0, **options)), written(language_model(name)))


def test_a_window_generates_what_whole_calls_give() -> None:
    program = cut("llama", 0.5, **WINDOW)
    ids = PROMPT[1:]
    for _ in range(8):
        ids = torch.cat([ids, decode(program, ids, (ids.shape[1],))[0][:, -1:].argmax(-1)], 1)
    assert torch.equal(CausalLM(program).generate(PROMPT[1:], 8), ids)


@pytest.mark.parametrize("options", [{}, GROUPED, WINDOW], ids=str)
def test_onnx_runtime_generates_the_same_with_half_the_cache(
    options: dict[str, Any], tmp_path: Path
) -> None:
    program = cut("llama", 0.5, **options)
    path = tmp_path / "model.onnx"
    to_onnx(program, path)
    assert torch.equal(written(path), written(program))


def read_back(program: Program, path: Path) -> Program:
    """Writes the program as .pt2, and checks that the file generates the same."""
    to_pt2(program, path)
    assert torch.equal(written(path), written(program))
    return redpass.load(path)


def test_a_pt2_holds_a_window(tmp_path: Path) -> None:
    program = cut("llama", 0.5, **WINDOW)
    back = read_back(program, tmp_path / "model.pt2")
    assert back.signature == program.signature
    assert torch.equal(written(back), written(program))
    sites = [s for s in find_sites(back, Facts(back)) if not isinstance(s, Skip)]
    assert "latent_attention" not in [site.op for site in sites]


def test_a_pt2_generates_the_same_and_its_latent_attention_is_found(tmp_path: Path) -> None:
    program = cut("llama", 0.5, **GROUPED)
    back = read_back(program, tmp_path / "model.pt2")
    ids = torch.randint(3, 64, (3, 12), generator=torch.Generator().manual_seed(5))
    assert torch.allclose(decode(back, ids)[0], decode(program, ids)[0], atol=1e-5)
    for found in (program, back):
        sites = [s for s in find_sites(found, Facts(found)) if not isinstance(s, Skip)]
        assert [site.op for site in sites].count("latent_attention") == 2
