"""Data files to batches, and input specs."""

import json

import numpy as np
import pytest
import torch
from torch import nn

from redpass.checks.input_specs import parse, parse_all
from redpass.errors import DataError, UsageError
from redpass.frontend import complete_inputs, load, read_batches
from redpass.frontend.specs import example
from redpass.frontend.tokenizer import tokens


class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(32, 8), nn.Linear(8, 2)

    def forward(self, input_ids, attention_mask):
        mask = attention_mask[..., None].float()
        return {"logits": self.head((self.embed(input_ids) * mask).sum(1) / mask.sum(1))}


@pytest.fixture(scope="module")
def program():
    specs = ["input_ids:int64[batch,seq]", "attention_mask:int64[batch,seq]"]
    return load(Classifier(), inputs=specs)


@pytest.fixture(scope="module")
def tokenizer():
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    words = {w: i for i, w in enumerate(["[PAD]", "[UNK]", "a", "cat", "sat", "down"])}
    model = tokenizers.models.WordLevel(words, unk_token="[UNK]")
    raw = tokenizers.Tokenizer(model)
    raw.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="[PAD]", unk_token="[UNK]"
    )


def test_arrays(program, tmp_path):
    ids = np.arange(20, dtype=np.int32).reshape(5, 4)
    np.savez(tmp_path / "d.npz", input_ids=ids, labels=np.arange(5) % 2)
    found = read_batches(tmp_path / "d.npz", program, batch_size=2)
    assert [len(b["input_ids"]) for b in found] == [2, 2, 1]
    assert found[0]["input_ids"].dtype == torch.int64
    assert bool((found[0]["attention_mask"] == 1).all())
    assert found[1]["labels"].tolist() == [0, 1]
    program(**{k: v for k, v in found[2].items() if k != "labels"})


@pytest.mark.parametrize("kind", ["safetensors", "pt"])
def test_tensors(program, tmp_path, kind):
    from safetensors.torch import save_file

    table = {"input_ids": torch.arange(12).view(3, 4), "attention_mask": torch.ones(3, 4).long()}
    path = tmp_path / f"d.{kind}"
    (save_file if kind == "safetensors" else torch.save)(table, path)
    assert torch.equal(read_batches(path, program)[0]["input_ids"], table["input_ids"])
    assert len(read_batches(path, program, limit=2)[0]["input_ids"]) == 2


def test_text(program, tokenizer, tmp_path):
    (tmp_path / "d.txt").write_text("a cat sat down\n\ncat\n")
    batch = read_batches(tmp_path / "d.txt", program, tokenizer=tokenizer)[0]
    assert batch["input_ids"].tolist() == [[2, 3, 4, 5], [3, 0, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 0, 0, 0]]


def test_json_lines_with_labels_cut_to_length(program, tokenizer, tmp_path):
    rows = [{"text": "a cat sat down", "label": 1}, {"text": "cat", "label": 0}]
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, rows)))
    batch = read_batches(tmp_path / "d.jsonl", program, tokenizer=tokenizer, length=2)[0]
    assert batch["input_ids"].tolist() == [[2, 3], [3, 0]]
    assert batch["labels"].tolist() == [1, 0]


def test_a_tokenizer_of_a_folder(program, tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "tok")
    (tmp_path / "d.txt").write_text("cat\n")
    batch = read_batches(tmp_path / "d.txt", program, tokenizer=tmp_path / "tok")[0]
    assert batch["input_ids"].tolist() == [[3]]


def test_a_causal_lm_gets_positions_and_an_empty_past():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=32,
    )
    program = load(transformers.LlamaForCausalLM(config).eval())
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    batch = complete_inputs(program, {"input_ids": torch.ones(2, 3).long(), "attention_mask": mask})
    assert batch["position_ids"].tolist() == [[0, 1, 2], [0, 1, 1]]
    assert batch["past_key_values.0.key"].shape == (2, 2, 0, 8)
    assert program(**batch)[0].shape == (2, 3, 32)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.npz", None, "no such file"),
        ("d.txt", b"", "the file is empty"),
        ("d.txt", b"\n \n", "only empty lines"),
        ("d.txt", b"\xff\xfe", "no UTF-8"),
        ("d.jsonl", b'{"text": "a"}\n{"words": 1}', "line 2: no 'text'"),
        ("d.jsonl", b"{", "line 1: not JSON"),
        ("d.npz", b"PK not really", "cannot be read"),
        ("d.safetensors", b"1234", "truncated"),
        ("d.pt", b"1234", "no zip archive"),
    ],
)
def test_data_that_cannot_be_read(program, tokenizer, tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        read_batches(tmp_path / name, program, tokenizer=tokenizer)
    assert name in str(caught.value)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"input_ids": np.zeros((2, 3))}, "input_ids': found float64"),
        ({"input_ids": np.zeros(4, np.int64)}, "input_ids': found int64"),
        ({"input_ids": np.zeros((2, 3), np.int64), "other": np.zeros(2)}, "unknown column 'other'"),
        ({"attention_mask": np.ones((2, 3), np.int64)}, "the data has no 'input_ids'"),
        ({"input_ids": np.zeros((2, 3), np.int64), "labels": np.zeros(3)}, "different lengths"),
        ({"input_ids": np.zeros((0, 3), np.int64)}, "no rows"),
    ],
)
def test_data_that_does_not_fit(program, tmp_path, table, message):
    np.savez(tmp_path / "d.npz", **table)
    with pytest.raises(DataError, match=message):
        read_batches(tmp_path / "d.npz", program)


def test_nan_in_data(tmp_path):
    program = load(nn.Linear(4, 2), inputs=["input:float32[batch,4]"])
    np.savez(tmp_path / "d.npz", input=np.full((2, 4), np.nan, np.float32))
    with pytest.raises(DataError, match=r"NaN or infinity") as caught:
        read_batches(tmp_path / "d.npz", program)
    assert "input 'input'" in str(caught.value)


def test_text_without_a_tokenizer(program, tmp_path):
    (tmp_path / "d.txt").write_text("cat\n")
    with pytest.raises(UsageError, match=r"text needs a tokenizer(.|\n)*--tokenizer"):
        read_batches(tmp_path / "d.txt", program)


def test_pickles_in_arrays_are_not_read(program, tmp_path):
    np.savez(tmp_path / "d.npz", input_ids=np.array([{"a": 1}], dtype=object))
    with pytest.raises(DataError, match="cannot be read"):
        read_batches(tmp_path / "d.npz", program)


def test_specs():
    spec = parse("past_key_values.0.key:float16[batch,2,past + seq,8]")
    assert (spec.name, spec.dtype) == ("past_key_values.0.key", "float16")
    assert spec.axes == ("batch", 2, "past + seq", 8)
    values = example(parse_all(["x:float32[batch,n,3]", "mask:bool[batch,n]"]))
    assert values["x"].shape[0] != values["x"].shape[1]
    assert values["x"].shape[:2] == values["mask"].shape


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x", "is no input spec"),
        ("x:float31[2]", "unknown dtype(.|\n)*float32"),
        ("x:float32[a,,b]", "is no size"),
        ("x:float32[a-1]", "is no size"),
    ],
)
def test_specs_that_are_wrong(text, message):
    with pytest.raises(UsageError, match=message):
        parse(text)


def test_an_input_described_twice():
    with pytest.raises(UsageError, match="'x' is described twice"):
        parse_all(["x:float32[2]", "x:int64[2]"])


def test_data_serves_as_example(tmp_path):
    torch.save(nn.Sequential(nn.Linear(4, 2)), tmp_path / "m.pt")
    np.savez(tmp_path / "d.npz", input=np.ones((6, 4), np.float32))
    program = load(tmp_path / "m.pt", data=tmp_path / "d.npz")
    assert str(program.signature.inputs[0]) == "input:float32[batch,4]"


class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(20, 4)

    def forward(self, input_ids):
        return self.table(input_ids)


@pytest.mark.parametrize(("value", "found"), [(20, "holds 20"), (-1, "holds -1")])
def test_a_token_outside_the_vocabulary(tmp_path, value, found):
    program = load(Words(), inputs=["input_ids:int64[batch,seq]"])
    rows = np.arange(40).reshape(8, 5) % 20
    np.savez(tmp_path / "x.npz", input_ids=rows)
    assert len(read_batches(tmp_path / "x.npz", program, batch_size=2)) == 4
    rows[6, 2] = value
    np.savez(tmp_path / "x.npz", input_ids=rows)
    with pytest.raises(DataError, match=rf"x\.npz: input 'input_ids': {found}, .* 20 rows\n"):
        read_batches(tmp_path / "x.npz", program, batch_size=2)


def test_a_fixed_batch_names_the_option(tmp_path):
    program = load(nn.Linear(4, 4), inputs=["input:float32[2,4]"])
    np.savez(tmp_path / "x.npz", input=np.ones((8, 4), dtype=np.float32))
    with pytest.raises(DataError, match="2 rows at a time: --batch-size 2"):
        read_batches(tmp_path / "x.npz", program, batch_size=4)


def test_a_tokenizer_that_panics_is_told():
    class PanicException(BaseException):
        pass

    def tokenizer(*_, **__):
        raise PanicException("index out of bounds")

    with pytest.raises(DataError, match=r"the tokenizer fails .*index out of bounds"):
        tokens(tokenizer, ["a"], 8)


def test_a_stop_inside_a_tokenizer_stays_one():
    def tokenizer(*_, **__):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tokens(tokenizer, ["a"], 8)
