"""Kernels of models that approximate passes have made smaller, as a user emits them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from caching import language_model, plan_with

import redpass
from redpass import rewrite
from redpass.codegen.emit import Emitted, emit
from redpass.codegen.folder import write_kernels
from redpass.passes.cache_latents import CacheLatents
from redpass.passes.cluster_heads import ClusterHeads
from redpass.passes.factor_linears import FactorLinears
from redpass.passes.prune_channels import PruneChannels
from redpass.program import Program

NARROW = (ClusterHeads(shares=(0.5,)), PruneChannels(shares=(0.75,)))
LATENT = (CacheLatents(shares=(0.5,), keys="rebuilt", multiple=1),)


def reduced(name: str, passes: tuple[Any, ...], thin: str = "") -> Program:
    """The first rung of each place, and the exact passes behind.

    Args:
        thin: linears with this in their name are factored as well.
    """
    program = language_model(name)
    for item in (*passes, FactorLinears(shares=(0.5,), multiple=1)) if thin else passes:
        rungs = {}
        for action in plan_with(item, program).actions:
            if not isinstance(item, FactorLinears) or thin in action.target:
                rungs.setdefault(action.place, action)
        program = rewrite.apply(program, rungs.values())
    return redpass.optimize(program).program


CASES = {
    "gpt2, clusters": lambda: reduced("gpt2", NARROW, "c_proj"),
    "qwen3, clusters": lambda: reduced("qwen3", NARROW, "o_proj"),
    "qwen3, latents": lambda: reduced("qwen3", LATENT),
}


@pytest.fixture(scope="module")
def emitted() -> dict[str, tuple[Emitted, ...]]:
    return {label: emit(make())[0] for label, make in CASES.items()}


OPS = {
    "gpt2, clusters": {"clustered_attention", "low_rank_linear", "add_norm"},
    "qwen3, clusters": {"clustered_attention", "low_rank_linear", "add_norm", "rotary",
                        "gated_feed_forward"},
    "qwen3, latents": {"latent_attention", "add_norm", "gated_feed_forward"},
}  # fmt: skip


@pytest.mark.parametrize("label", CASES)
def test_every_hot_path_has_a_file(label: str, emitted: dict[str, tuple[Emitted, ...]]) -> None:
    assert {file.op for file in emitted[label]} == OPS[label]


def shapes(files: tuple[Emitted, ...], op: str) -> list[dict[str, tuple[str, ...]]]:
    return [{o.name: o.shape for o in file.operands} for file in files if file.op == op]


def test_what_passes_left_is_burned_in(emitted: dict[str, tuple[Emitted, ...]]) -> None:
    """Clusters, ranks, pruned widths, latents and the norm of keys."""
    files = emitted["qwen3, clusters"]
    clusters = [file.source for file in files if file.op == "clustered_attention"]
    assert all("CLUSTERS = [" in text and "KEYS = [" in text for text in clusters)
    attentions = shapes(files, "clustered_attention")
    assert all(int(sizes["q"][1]) < 4 for sizes in attentions), "of four heads"
    assert all(int(s["down"][0]) < 32 for s in shapes(files, "low_rank_linear"))
    assert {int(s["gate"][0]) for s in shapes(files, "gated_feed_forward")} == {48}, "of 64"
    (latent,) = [file for file in emitted["qwen3, latents"] if file.op == "latent_attention"]
    assert "KEY_EPS = 1e-06" in latent.source
    sizes = {operand.name: operand.shape for operand in latent.operands}
    assert sizes["key_latent"][2:] == ("2", "4")
    assert sizes["key_gain"] == ("8",)


@pytest.mark.slow
@pytest.mark.parametrize("label", CASES)
def test_emitted_tests_hold(
    label: str, emitted: dict[str, tuple[Emitted, ...]], tmp_path: Path
) -> None:
    write_kernels(tmp_path, list(emitted[label]), ())
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "kernels"]
    without = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "TRITON_INTERPRET")}
    done = subprocess.run(command, cwd=tmp_path, env=without, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
