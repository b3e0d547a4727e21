"""Hugging Face folders of models whose stream was made narrower."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import redpass
from redpass import rewrite
from redpass.data import Batches
from redpass.errors import ExportError
from redpass.export import to_huggingface
from redpass.facts import Facts
from redpass.lineage import extend
from redpass.passes.slice_stream import SliceStream
from redpass.program import Program
from redpass.verify.inputs import complete

transformers = pytest.importorskip("transformers")

ENDS = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0, "vocab_size": 61}
TEXT: dict[str, Any] = {
    **ENDS, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 48, "max_position_embeddings": 64,
}  # fmt: skip
GPT2: dict[str, Any] = {**ENDS, "n_layer": 2, "n_embd": 32, "n_head": 4, "n_positions": 64}


def written(name: str, folder: Path, **options: Any) -> Program:
    """The program of a small random model that was saved as a folder."""
    kind = getattr(transformers, name)
    torch.manual_seed(0)
    model = kind(kind.config_class(**options)).eval()
    for parameter in model.parameters():
        parameter.data.add_(0.05 * torch.randn(parameter.shape))
    model.save_pretrained(folder)
    return redpass.load(folder)


def narrowed(program: Program, **options: Any) -> Program:
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(1, 60, (4, 12), generator=generator) for _ in range(2)]
    data = Batches(tuple(complete(program, {"input_ids": ids}) for ids in rows))
    plan = SliceStream(shares=(0.75,), **options).plan(program, Facts(program, data))
    after = rewrite.apply(program, plan.actions)
    return replace(after, lineage=extend(program, program, plan.actions))


def test_a_stream_without_biases_is_a_number_of_the_configuration(tmp_path: Path) -> None:
    program = written("Qwen3ForCausalLM", tmp_path / "source", **TEXT, head_dim=8,
                      tie_word_embeddings=False)  # fmt: skip
    report = to_huggingface(narrowed(program), tmp_path / "hf")
    assert max(report.worst.values()) <= 1
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    assert (model.config.hidden_size, model.config.head_dim) == (24, 8)
    assert model.config.intermediate_size == 48
    ids = torch.arange(1, 13).view(2, 6)
    assert model.generate(ids, max_new_tokens=4, do_sample=False).shape == (2, 10)


@pytest.mark.slow
def test_a_tied_table_has_no_two_values(tmp_path: Path) -> None:
    program = written("Qwen3ForCausalLM", tmp_path / "source", **TEXT, head_dim=8,
                      tie_word_embeddings=True)  # fmt: skip
    with pytest.raises(ExportError, match="one parameter in the source and has two values"):
        to_huggingface(narrowed(program, tied="apart"), tmp_path / "hf")


def test_what_a_configuration_cannot_say_is_told(tmp_path: Path) -> None:
    program = written("GPT2LMHeadModel", tmp_path / "source", **GPT2)
    with pytest.raises(ExportError, match="is computed by the result"):
        to_huggingface(narrowed(program), tmp_path / "hf")
    assert not (tmp_path / "hf").exists()
