"""The traced program beside a journal: the same program back, or none, and nothing is run."""

from __future__ import annotations

import json
import random
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from redpass.errors import RedpassError
from redpass.frontend import NaNWeightsWarning, kept, load
from redpass.frontend.kept import key_of, load_kept
from redpass.program import Program


class Model(nn.Module):
    """Tied, sliced and transposed weights, sizes that are computed, infinities and types."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 6)
        self.inner = nn.Linear(6, 6)
        self.inner.weight.data = self.inner.weight.data.t()
        self.head = nn.Linear(6, 7, bias=False)
        self.head.weight = self.table.weight
        self.register_buffer("whole", torch.randn(12))
        self.register_buffer("part", self.whole[6:])

    def forward(self, ids: Tensor) -> dict[str, Tensor]:
        """Masked sums over the sequence, then logits."""
        x = self.inner(self.table(ids)) + self.part * self.whole[:6]
        length = ids.shape[1]
        mask = torch.full((length, length), float("-inf")).triu(1)
        x = torch.softmax(x @ x.transpose(1, 2) + mask, -1) @ x
        top, _ = x.double().to(torch.float32).split(3, dim=-1)
        flat = torch.cat([top, x[..., 3:]], -1).reshape(ids.shape[0] * length, -1)
        return {"logits": self.head(flat).view(*ids.shape, -1)}


@pytest.fixture(scope="module")
def program() -> Program:
    torch.manual_seed(0)
    return load(Model().eval(), inputs=["ids:int64[batch,seq]"])


@pytest.fixture(scope="module")
def good(program: Program, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("kept") / "file"
    kept.write(program, path, "key")
    return path.read_bytes()


def same_memory(program: Program) -> list[list[bool]]:
    places = [weight.untyped_storage().data_ptr() for weight in program.weights.values()]
    return [[one == other for other in places] for one in places]


def test_what_is_read_back_is_the_program(program: Program, good: bytes, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(good)
    again = kept.read(tmp_path / "file", "key")
    assert again.text == program.text
    assert again.signature == program.signature
    assert again.origin == program.origin
    assert same_memory(again) == same_memory(program)
    for name, weight in program.weights.items():
        assert torch.equal(again.weights[name], weight)
        assert again.weights[name].stride() == weight.stride()
    for old, new in zip(program.graph.nodes, again.graph.nodes, strict=True):
        assert old.meta.get("stack_trace") == new.meta.get("stack_trace")
        paths = [path for path, _ in old.meta.get("nn_module_stack", {}).values()]
        assert [path for path, _ in new.meta.get("nn_module_stack", {}).values()] == paths
    assert kept._hints(again) == kept._hints(program)
    ids = torch.randint(0, 7, (3, 5))
    assert torch.equal(again(ids)[0], program(ids)[0])


def test_a_cached_language_model_comes_back(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=17, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    program = load(tmp_path / "llama")
    kept.write(program, tmp_path / "file", "key")
    again = kept.read(tmp_path / "file", "key")
    assert (again.digest, again.origin) == (program.digest, program.origin)


def test_damage_anywhere_is_noticed(program: Program, good: bytes, tmp_path: Path) -> None:
    chance, path = random.Random(0), tmp_path / "file"
    for number in range(60):
        spot = chance.randrange(len(good))
        bad = (
            good[:spot] if number % 2 else good[:spot] + bytes([good[spot] ^ 1]) + good[spot + 1 :]
        )
        path.write_bytes(bad)
        with pytest.warns(UserWarning, match="the kept program is not used"):
            assert load_kept(path, "key", lambda: program, resume=True) is program
        assert path.read_bytes() == good, "kept anew"


def forged(good: bytes, change, tmp_path: Path) -> Path:
    """A file whose sums are right and whose graph is not ours."""
    import hashlib

    line, _, rest = good.partition(b"\n")
    head = json.loads(line)
    data = json.loads(rest[: head["text"]])
    change(data)
    text = json.dumps(data).encode()
    rest = text + rest[head["text"] :]
    head |= {"text": len(text), "sha256": hashlib.sha256(rest).hexdigest()}
    (tmp_path / "file").write_bytes(json.dumps(head).encode() + b"\n" + rest)
    return tmp_path / "file"


def _call(data, target: str) -> None:
    node = next(node for node in data["graph"]["nodes"] if node[0] == "call_function")
    node[2] = target


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda data: _call(data, "os.system"), "is not allowed"),
        (lambda data: _call(data, "torch.ops.aten.from_file.default"), "is not allowed"),
        (lambda data: _call(data, "torch.ops.aten.add_.Tensor"), None),
        (lambda data: data["graph"]["nodes"].reverse(), None),
        (lambda data: data["graph"]["nodes"].pop(), None),
        (lambda data: data.update(digest="0"), "those that were kept"),
        (lambda data: data["origin"].update(digest="0"), "those that were kept"),
        (lambda data: data["weights"]["part"].__setitem__(4, 9), None),
        (lambda data: data["weights"]["part"].__setitem__(1, "load"), "no kind of number"),
        (lambda data: data.update(sizes={}), None),
        (lambda data: data.update(blocks=[2**62]), "cut short"),
        (lambda data: data.update(signature="{}"), "signature"),
    ],
)  # fmt: skip
def test_a_forged_one_is_no_program(
    change, reason: str | None, good: bytes, tmp_path: Path
) -> None:
    path = forged(good, change, tmp_path)
    with pytest.raises(kept._NO_PROGRAM, match=reason):
        kept.read(path, "key")


def test_one_of_other_work_is_passed_over(program: Program, good: bytes, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(good)
    with pytest.warns(UserWarning, match="of another model"):
        load_kept(path, "other", lambda: program, resume=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_kept(path, "other", lambda: pytest.fail("traced"), resume=True).text
        assert load_kept(path, "key", lambda: program, resume=False) is program


def test_a_link_is_not_followed(program: Program, good: bytes, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_bytes(good)
    (tmp_path / "file").symlink_to(tmp_path / "elsewhere")
    with pytest.warns(UserWarning, match="is not used"):
        assert load_kept(tmp_path / "file", "key", lambda: program, resume=True) is program


def test_what_cannot_be_kept_stops_nothing(
    program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise RedpassError("the disk is full")

    monkeypatch.setattr(kept, "write", full)
    with pytest.warns(UserWarning, match="not kept: the disk is full"):
        assert load_kept(tmp_path / "file", "key", lambda: program, resume=False) is program
    monkeypatch.undo()
    monkeypatch.setattr(kept, "LARGEST_WEIGHTS", 10)
    assert load_kept(tmp_path / "file", "key", lambda: program, resume=False) is program
    assert not (tmp_path / "file").exists()


def test_nan_is_told_again(program: Program, tmp_path: Path) -> None:
    model = Model().eval()
    with torch.no_grad():
        model.inner.bias[0] = float("nan")
    with pytest.warns(NaNWeightsWarning, match=r"inner\.bias"):
        spoilt = load(model, inputs=["ids:int64[batch,seq]"])
    kept.write(spoilt, tmp_path / "file", "key")
    with pytest.warns(NaNWeightsWarning, match=r"inner\.bias"):
        load_kept(tmp_path / "file", "key", lambda: pytest.fail("traced"), resume=True)


def test_the_key_follows_files_and_options(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "notes.md").write_text("a")
    first = key_of(folder, None, ["x:int64[batch]"])
    (folder / "notes.md").write_text("b")
    assert key_of(folder, None, ["x:int64[batch]"]) == first
    assert key_of(folder, None, ["x:int64[n]"]) != first
    rows = tmp_path / "rows.npz"
    rows.write_text("a")
    given = key_of(folder, rows)
    rows.write_text("b")
    assert key_of(folder, rows) != given
    (folder / "config.json").write_text("{ }")
    assert key_of(folder, None, ["x:int64[batch]"]) != first
