"""A small good file of every format that redpass reads, and how each is read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import mutations
import numpy as np
import torch
from fuzzing import Format
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import PreTrainedTokenizerFast

from redpass import export
from redpass.frontend import batches, huggingface, load, pickled
from redpass.frontend.tokenizer import open_tokenizer
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


def _index(folder: Path) -> Format:
    from transformers import BertModel

    sharded = folder / "sharded"
    BertModel.from_pretrained(_folder(folder)).save_pretrained(sharded, max_shard_size=1500)
    samples = [(sharded, "model.safetensors.index.json")]
    ways = (mutations.damage, mutations.edit_json)
    return Format("index", samples, ways, lambda path: huggingface.open_folder(path))


def _rows(folder: Path) -> Format:
    program = small(folder)
    save_file({"input": torch.randn(8, 4)}, folder / "rows.safetensors")
    ways = (mutations.damage, mutations.edit_safetensors)
    samples = [(folder / "rows.safetensors", "")]
    return Format("rows", samples, ways, lambda path: batches.read_batches(path, program))


def _tokenizer(folder: Path) -> Path:
    words = Tokenizer(models.WordLevel({"?": 0, "a": 1, "b": 2, "c": 3}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?", pad_token="?")
    fast.save_pretrained(folder / "words")
    return folder / "words"


def _lines(folder: Path) -> Format:
    program, words = load(_folder(folder)), open_tokenizer(_tokenizer(folder))
    rows = [
        {"text": "a b c", "label": 1},
        {"text": "c\u00e9 a", "label": 0},
        {"text": "b", "label": 2},
    ]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))

    def read(path: Path) -> object:
        return batches.read_batches(path, program, tokenizer=words)

    ways = (mutations.damage, _edit_rows)
    return Format("lines", [(folder / "rows.jsonl", "")], ways, read)


def _edit_rows(data: bytes, chance) -> bytes:
    lines = data.split(b"\n")
    number = chance.randrange(len(lines))
    lines[number] = mutations.edit_json(lines[number], chance)
    return b"\n".join(lines)


def _words(folder: Path) -> Format:
    (folder / "rows.txt").write_text("a b c\nd\n")

    def read(path: Path) -> object:
        return batches.read_rows(folder / "rows.txt", tokenizer=path)

    words = _tokenizer(folder)
    names = ("tokenizer.json", "tokenizer.json", "tokenizer_config.json")
    ways = (mutations.damage, mutations.edit_json, mutations.edit_json)
    return Format("tokenizer", [(words, name) for name in names], ways, read)


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
    "npz": _npz, "journal": _journal, "manifest": _manifest, "index": _index, "rows": _rows,
    "lines": _lines, "tokenizer": _words,
}  # fmt: skip
"""Name -> what writes the good samples into a folder and says how they are damaged and read."""
