"""A small good file of every format that redpass reads, and how each is read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import mutations
import numpy as np
import torch
from fuzzing import Format
from torch import nn

from redpass import export
from redpass.frontend import batches, huggingface, load, pickled
from redpass.journal import Journal
from redpass.manifest import read_manifest
from redpass.pipeline import optimize
from redpass.program import Program
from redpass.recipe import read_recipe, replay

SPEC = ["input:float32[batch,4]"]


def module() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 2)).eval()


def _pt(folder: Path) -> Format:
    torch.save(module(), folder / "whole.pt")
    torch.save(module().state_dict(), folder / "weights.pt")

    def read(path: Path) -> object:
        return pickled.build(path, pickled.load_pickled(path), f"{__name__}:module")

    samples = [(folder / "whole.pt", ""), (folder / "weights.pt", "")]
    return Format("pt", samples, (mutations.damage, mutations.edit_member), read)


def _pt2(folder: Path) -> Format:
    auto = torch.export.Dim.AUTO
    exported = torch.export.export(module(), (torch.zeros(3, 4),), dynamic_shapes=({0: auto},))
    torch.export.save(exported, folder / "plain.pt2")
    export.to_pt2(load(folder / "plain.pt2"), folder / "ours.pt2")
    samples = [(folder / "plain.pt2", ""), (folder / "ours.pt2", "")]
    ways = (mutations.damage, mutations.edit_member, mutations.edit_member)
    return Format("pt2", samples, ways, load)


def _folder(folder: Path) -> Path:
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=11, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=12, max_position_embeddings=8,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder / "bert")
    return folder / "bert"


def _safetensors(folder: Path) -> Format:
    samples = [(_folder(folder), "model.safetensors")]
    ways = (mutations.damage, mutations.edit_safetensors)
    return Format("safetensors", samples, ways, lambda path: huggingface.open_folder(path))


def _config(folder: Path) -> Format:
    samples = [(_folder(folder), "config.json")]
    ways = (mutations.damage, mutations.edit_json, mutations.edit_json)
    return Format("config", samples, ways, lambda path: huggingface.open_folder(path))


def small(folder: Path) -> Program:
    torch.save(module(), folder / "small.pt")
    return load(folder / "small.pt", inputs=SPEC)


def _recipe(folder: Path) -> Format:
    program = small(folder)
    record = optimize(program, "drop_noops,merge_linears,drop_dead_nodes").record
    text = json.loads(record.to_json())["recipe"]
    (folder / "plan.json").write_text(json.dumps(text, indent=1))

    def read(path: Path) -> object:
        return replay(program, read_recipe(path))

    ways = (mutations.damage, mutations.edit_json)
    return Format("recipe", [(folder / "plan.json", "")], ways, read)


def _npz(folder: Path) -> Format:
    program = small(folder)
    rows = np.random.default_rng(0).standard_normal((8, 4), dtype=np.float32)
    np.savez(folder / "rows.npz", input=rows)
    np.savez_compressed(folder / "packed.npz", input=rows)
    samples = [(folder / "rows.npz", ""), (folder / "packed.npz", "")]
    ways = (mutations.damage, mutations.edit_member)
    return Format("npz", samples, ways, lambda path: batches.read_batches(path, program))


def _journal(folder: Path) -> Format:
    journal = Journal.open(folder / "sample", "work")
    for number in range(5):
        journal.recall(f"figure {number}", lambda n=number: {"value": n / 3, "name": "kl"})
    assert journal.path is not None
    name = journal.path.name.removeprefix("sample")

    def read(path: Path) -> object:
        file = path.with_name("case" + name)
        path.rename(file)
        opened = Journal.open(path, "work")
        found = [opened.recall(f"figure {n}", lambda: None) for n in range(5)]
        assert all(v in (None, {"value": n / 3, "name": "kl"}) for n, v in enumerate(found))
        return found

    return Format("journal", [(journal.path, "")], (mutations.damage, _edit_lines), read)


def _edit_lines(data: bytes, chance) -> bytes:
    lines = data.split(b"\n")
    chance.shuffle(lines)
    return b"\n".join(lines[: chance.randrange(1, len(lines) + 1)])


def _manifest(folder: Path) -> Format:
    files = {"model.pt2": {"bytes": 5, "sha256": "00"}, "a/b": {"bytes": 1, "sha256": "11"}}
    text = json.dumps({"format": "redpass-artifact-1", "files": files})
    (folder / "artifact").mkdir()
    (folder / "artifact" / "manifest.json").write_text(text)
    ways = (mutations.damage, mutations.edit_json)
    return Format("manifest", [(folder / "artifact", "manifest.json")], ways, read_manifest)


FORMATS: dict[str, Callable[[Path], Format]] = {
    "pt": _pt, "pt2": _pt2, "safetensors": _safetensors, "config": _config, "recipe": _recipe,
    "npz": _npz, "journal": _journal, "manifest": _manifest,
}  # fmt: skip
"""Name -> what writes the good samples into a folder and says how they are damaged and read."""
