"""Files that must be refused, built when they are needed; what they would run makes a folder."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n"
BYTES = Callable[[str, bytes], bytes | None]


class Canary:
    """Makes a folder when a plain unpickler meets it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@dataclass(frozen=True)
class Good:
    """Good files to make bad ones of, and where their payload would leave its mark."""

    pt: Path
    pt2: Path
    folder: Path
    canary: Path


def good(folder: Path, canary: Path) -> Good:
    """Writes the good files into `folder`."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 2)).eval()
    torch.save(module, folder / "good.pt")
    auto = torch.export.Dim.AUTO
    exported = torch.export.export(module, (torch.zeros(3, 4),), dynamic_shapes=({0: auto},))
    torch.export.save(exported, folder / "good.pt2")
    config = BertConfig(
        vocab_size=11, hidden_size=8, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=12, max_position_embeddings=8,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder / "bert")
    return Good(folder / "good.pt", folder / "good.pt2", folder / "bert", canary)


def pickled(value: object, **options: Any) -> bytes:
    """Returns what `torch.save` writes."""
    buffer = io.BytesIO()
    torch.save(value, buffer, **options)
    return buffer.getvalue()


def rezip(source: Path, target: Path, change: BYTES, extra: dict[str, bytes] | None = None) -> Path:
    """Copies an archive: `change(name, data)` gives new data, or None to drop the member."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            data = change(name.partition("/")[2], old.read(name))
            if data is not None:
                new.writestr(name, data)
        for name, data in (extra or {}).items():
            new.writestr(name, data)
    return target


def _same(_: str, data: bytes) -> bytes:
    return data


def _model(change: Callable[[Any], None]) -> BYTES:
    def member(name: str, data: bytes) -> bytes:
        if not name.startswith("models/"):
            return data
        value = json.loads(data)
        change(value)
        return json.dumps(value).encode()

    return member


def _weights(change: Callable[[Any], None]) -> BYTES:
    def member(name: str, data: bytes) -> bytes:
        if not name.endswith("weights_config.json"):
            return data
        value = json.loads(data)
        change(next(iter(value["config"].values())))
        return json.dumps(value).encode()

    return member


def _graph(model: Any) -> Any:
    return model["graph_module"]["graph"]


def _code(good: Good) -> str:
    return f"__import__('os').mkdir({str(good.canary)!r})"


def _pt2(change: Callable[[Good], tuple[BYTES, dict[str, bytes]]]) -> Callable[[Good, Path], Path]:
    def make(good: Good, folder: Path) -> Path:
        edit, extra = change(good)
        return rezip(good.pt2, folder / "model.pt2", edit, extra)

    return make


def _op(target: str) -> Callable[[Good, Path], Path]:
    def change(model: Any) -> None:
        _graph(model)["nodes"][0]["target"] = target

    return _pt2(lambda _: (_model(change), {}))


def _written(name: str, data: bytes) -> Callable[[Good, Path], Path]:
    def make(_: Good, folder: Path) -> Path:
        (folder / name).write_bytes(data)
        return folder / name

    return make


def _pickle(protocol: int) -> Callable[[Good, Path], Path]:
    def make(good: Good, folder: Path) -> Path:
        path = folder / "model.pt"
        path.write_bytes(pickled({"w": Canary(good.canary)}, pickle_protocol=protocol))
        return path

    return make


class Download:
    """Asks a plain unpickler to fetch a file by a function of PyTorch's own."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return torch.hub.download_url_to_file, ("http://localhost:1/x", str(self.path))


def _download(good: Good, folder: Path) -> Path:
    (folder / "model.pt").write_bytes(pickled([Download(good.canary)]))
    return folder / "model.pt"


def _bare(good: Good, folder: Path) -> Path:
    (folder / "model.pt").write_bytes(pickle.dumps(Canary(good.canary)))
    return folder / "model.pt"


def _names(*names: str) -> Callable[[Good, Path], Path]:
    def make(good: Good, folder: Path) -> Path:
        extra = [(name, b"1") for name in names]
        path = rezip(good.pt, folder / "model.pt", _same)
        import warnings

        with warnings.catch_warnings(), zipfile.ZipFile(path, "a") as archive:
            warnings.simplefilter("ignore")  # zipfile warns of names that occur twice
            for name, data in extra:
                archive.writestr(name, data)
        return path

    return make


def _bomb(_: Good, folder: Path) -> Path:
    with zipfile.ZipFile(folder / "model.pt2", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/models/model.json", b"[" * (512 << 20))
    return folder / "model.pt2"


def _cut(good: Good, folder: Path) -> Path:
    data = good.pt.read_bytes()
    (folder / "model.pt").write_bytes(data[: len(data) // 2])
    return folder / "model.pt"


def _changed(good: Good, folder: Path) -> Path:
    data = good.pt2.read_bytes()
    spot = data.index(b'"graph_module"')
    (folder / "model.pt2").write_bytes(data[:spot] + b"X" + data[spot + 1 :])
    return folder / "model.pt2"


def _lacking(good: Good, folder: Path) -> Path:
    def change(name: str, data: bytes) -> bytes | None:
        return None if name == "data/0" else data

    return rezip(good.pt, folder / "model.pt", change)


def _short(good: Good, folder: Path) -> Path:
    return rezip(good.pt, folder / "model.pt", lambda n, d: d[:4] if n == "data/0" else d)


def _steps(_: Good, folder: Path) -> Path:
    with zipfile.ZipFile(folder / "model.pt", "w") as archive:
        archive.writestr("m/data.pkl", b"N0" * (16 << 20) + b".")
    return folder / "model.pt"


def _folder(change: Callable[[Path], None]) -> Callable[[Good, Path], Path]:
    def make(good: Good, folder: Path) -> Path:
        change(shutil.copytree(good.folder, folder / "model"))
        return folder / "model"

    return make


def _config(**values: Any) -> Callable[[Good, Path], Path]:
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text()) | values
        kept = {k: v for k, v in config.items() if v is not None}
        (folder / "config.json").write_text(json.dumps(kept))

    return _folder(change)


def _header(change: Callable[[dict[str, Any]], None]) -> Callable[[Good, Path], Path]:
    def edit(folder: Path) -> None:
        path = folder / "model.safetensors"
        data = path.read_bytes()
        size = int.from_bytes(data[:8], "little")
        table = json.loads(data[8 : 8 + size])
        change(table)
        text = json.dumps(table).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])

    return _folder(edit)


def _overlap(table: dict[str, Any]) -> None:
    names = [name for name in table if name != "__metadata__"]
    entry = table[names[-1]]
    length = entry["data_offsets"][1] - entry["data_offsets"][0]
    entry["data_offsets"] = [0, length]


def _rename(table: dict[str, Any]) -> None:
    table["unused"] = table.pop("embeddings.LayerNorm.bias")


def _transpose(table: dict[str, Any]) -> None:
    table["embeddings.word_embeddings.weight"]["shape"].reverse()


def _index(table: dict[str, Any]) -> Callable[[Good, Path], Path]:
    def change(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        (folder / "model.safetensors.index.json").write_text(json.dumps(table))

    return _folder(change)


def _only_pickles(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x02.")


def _loop(_: Good, folder: Path) -> Path:
    (folder / "model.pt2").symlink_to(folder / "model.pt2")
    return folder / "model.pt2"


def _truncate(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


def _cut_pt2(good: Good, folder: Path) -> Path:
    path = Path(shutil.copy(good.pt2, folder / "model.pt2"))
    _truncate(path)
    return path


def _to_itself(path: Path) -> None:
    path.unlink()
    path.symlink_to(path)


def _twice(folder: Path) -> None:
    path = folder / "model.safetensors"
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    text = data[8 : 8 + size].rstrip()
    first = text[1:].partition(b"}")[0] + b"}"
    text = b"{" + first + b"," + text[1:]
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])


def _pipe(_: Good, folder: Path) -> Path:
    os.mkfifo(folder / "model.pt2")
    return folder / "model.pt2"


def _directory(_: Good, folder: Path) -> Path:
    (folder / "model.pt").mkdir()
    return folder / "model.pt"


def _shape(sizes: list[int], strides: list[int]) -> Callable[[Good, Path], Path]:
    def change(entry: Any) -> None:
        meta = entry["tensor_meta"]
        meta["sizes"] = [{"as_int": n} for n in sizes]
        meta["strides"] = [{"as_int": n} for n in strides]

    return _pt2(lambda _: (_weights(change), {}))


def _set_size(model: Any, text: str) -> None:
    _graph(model)["tensor_values"]["input"]["sizes"][0]["as_expr"]["expr_str"] = text


SPEC = '[1, {"type": "evil.Type", "context": "{}", "children_spec": []}]'


def _set_spec(model: Any) -> None:
    model["graph_module"]["module_call_graph"][0]["signature"]["out_spec"] = SPEC


def _rename_weight(model: Any) -> None:
    specs = model["graph_module"]["signature"]["input_specs"]
    next(spec["parameter"] for spec in specs if "parameter" in spec)["parameter_name"] = "lost"


def _device(model: Any, kind: str, index: object = None) -> None:
    device = _graph(model)["tensor_values"]["input"]["device"]
    device.update(type=kind, index=index)


def _weights_device(entry: Any) -> None:
    entry["tensor_meta"]["device"]["type"] = "abacus"


def _json(text: bytes) -> Callable[[Good, Path], Path]:
    return _pt2(lambda _: (lambda n, d: text if n.startswith("models/") else d, {}))


CASES: dict[str, tuple[Callable[[Good, Path], Path], str]] = {
    "missing": (lambda _, folder: folder / "nothing.pt2", "no such file"),
    "empty": (_written("model.pt2", b""), "is empty"),
    "symlink loop": (_loop, "Too many levels"),
    "named pipe": (_pipe, "neither a file nor a folder"),
    "a directory": (_directory, "config.json"),
    "unknown suffix": (_written("model.bin", b"x"), "no model format"),
    "bare safetensors": (_written("model.safetensors", b"x"), "without a configuration"),
    "pt: git-lfs pointer": (_written("model.pt", POINTER.encode()), "git-lfs pointer"),
    "pt2: git-lfs pointer": (_written("model.pt2", POINTER.encode()), "git-lfs pointer"),
    "pt: truncated": (_cut, "truncated"),
    "pt2: truncated": (_cut_pt2, "truncated"),
    "pt2: changed byte": (_changed, "checksum"),
    "pt: text": (_written("model.pt", b"hello\n" * 100), "no zip archive"),
    "pt: bare pickle": (_bare, "no zip archive"),
    "pt: malicious, protocol 2": (_pickle(2), "posix.mkdir"),
    "pt: malicious, protocol 4": (_pickle(4), "STACK_GLOBAL"),
    "pt: malicious function of PyTorch": (_download, "torch.hub.download_url_to_file"),
    "pt: endless steps": (_steps, "instructions"),
    "pt: name twice": (_names("good/x", "good/X"), "occurs twice"),
    "pt: name goes up": (_names("good/../../x"), "leaves the archive"),
    "pt: absolute name": (_names("/etc/x"), "leaves the archive"),
    "pt: a storage is missing": (_lacking, "data/0"),
    "pt: a storage is short": (_short, "data/0"),
    "pt2: zip bomb": (_bomb, "claims 536870912"),
    "pt2: pickled weight": (
        _pt2(lambda _: (_weights(lambda e: e.update(use_pickle=True)), {})), "pickled or foreign"
    ),
    "pt2: weight elsewhere": (
        _pt2(lambda _: (_weights(lambda e: e.update(path_name="../x")), {})), "pickled or foreign"
    ),
    "pt2: old pickled weights": (
        _pt2(lambda g: (_same, {"good/data/weights/model.pt": pickled(Canary(g.canary))})),
        "no plain export",
    ),
    "pt2: custom object": (
        _pt2(lambda g: (_same, {"g/data/constants/custom_obj_0": pickle.dumps(Canary(g.canary))})),
        "no plain export",
    ),
    "pt2: library": (_pt2(lambda _: (_same, {"good/extra/run.so": b"\x7fELF"})), "no plain export"),
    "pt2: op torch.load": (_op("torch.load"), "is not allowed"),
    "pt2: op from_file": (_op("torch.ops.aten.from_file.default"), "is not allowed"),
    "pt2: op by import": (_op("os.system"), "is not allowed"),
    "pt2: op builtins": (_op("builtins.eval"), "is not allowed"),
    "pt2: op triton": (
        _op("torch.ops.higher_order.triton_kernel_wrapper_functional"), "is not allowed"
    ),
    "pt2: expression": (
        _pt2(lambda g: (_model(lambda m: _set_size(m, _code(g))), {})), "no size expression"
    ),
    "pt2: power tower": (
        _pt2(lambda _: (_model(lambda m: _set_size(m, "9**9**9**9")), {})), "no size expression"
    ),
    "pt2: range": (
        _pt2(lambda g: (_model(lambda m: m.update(range_constraints={_code(g): {}})), {})),
        "no size expression",
    ),
    "pt2: tree spec": (_pt2(lambda _: (_model(_set_spec), {})), "tree spec"),
    "pt2: deep": (_json(b"[" * 1_000_000), "not JSON"),
    "pt2: another schema": (
        _pt2(lambda _: (_model(lambda m: m["graph_module"].pop("signature")), {})),
        "has no 'signature'",
    ),
    "pt2: a value nobody gives": (
        _pt2(lambda _: (_model(lambda m: _graph(m)["nodes"].pop(0)), {})), "nothing before gives it"
    ),
    "pt2: a weight by a wrong name": (
        _pt2(lambda _: (_model(_rename_weight), {})), "the weight 'lost' is missing"
    ),
    "pt2: unknown format": (
        _pt2(lambda _: (lambda n, d: b"9" if n == "archive_version" else d, {})),
        "no version of this format",
    ),
    "pt2: no such device": (
        _pt2(lambda _: (_model(lambda m: _device(m, "abacus")), {})), "no device: .*abacus"
    ),
    "pt2: a device's number": (
        _pt2(lambda _: (_model(lambda m: _device(m, "cpu", "0")), {})), "no device: .*cpu"
    ),
    "pt2: a weight's device": (_pt2(lambda _: (_weights(_weights_device), {})), "no device"),
    "pt2: no list of weights": (
        _pt2(lambda _: (lambda n, d: None if n.endswith("weights_config.json") else d, {})),
        "a member is missing",
    ),
    "pt2: many values": (_json(b"[" + b"[]," * 5_000_000 + b"1]"), "values"),
    "pt2: long number": (_json(b'{"a": ' + b"9" * 100_000 + b"}"), "not JSON"),
    "pt2: no model": (_pt2(lambda _: (lambda n, d: None if "models/" in n else d, {})), "0 models"),
    "pt2: two models": (_pt2(lambda _: (_same, {"good/models/b.json": b"{}"})), "2 models"),
    "pt2: weight missing": (
        _pt2(lambda _: (lambda n, d: None if n.endswith("weight_0") else d, {})), "are missing"
    ),
    "pt2: weight short": (
        _pt2(lambda _: (lambda n, d: d[:8] if n.endswith("weight_0") else d, {})), "its shape takes"
    ),
    "pt2: huge shape": (_shape([1 << 30, 1 << 30], [0, 0]), "bad entry"),
    "pt2: negative stride": (_shape([6, 4], [-4, 1]), "bad entry"),
    "hf: not JSON": (_folder(lambda f: (f / "config.json").write_text("{") and None), "not JSON"),
    "hf: config pointer": (
        _folder(lambda f: (f / "config.json").write_text(POINTER) and None), "git-lfs pointer"
    ),
    "hf: weights pointer": (
        _folder(lambda f: (f / "model.safetensors").write_text(POINTER) and None), "git-lfs pointer"
    ),
    "hf: weights truncated": (
        _folder(lambda f: _truncate(f / "model.safetensors")), "truncated|does not fit|hole|end"
    ),
    "hf: weights are a loop": (
        _folder(lambda f: _to_itself(f / "model.safetensors")), "loop|Too many levels"
    ),
    "hf: config is a loop": (
        _folder(lambda f: _to_itself(f / "config.json")), "loop|Too many levels"
    ),
    "hf: a name twice": (_folder(_twice), "twice"),
    "hf: pickles only": (_folder(_only_pickles), "only pickled weights"),
    "hf: remote code": (
        _config(model_type="mystery", auto_map={"AutoModel": "evil.Model"}), "transformers knows"
    ),
    "hf: no type": (_config(model_type=None), "names neither"),
    "hf: type is no text": (_config(model_type=[1]), "is not text"),
    "hf: a billion layers": (_config(num_hidden_layers=10**9), "parts for"),
    "hf: quantised": (_config(quantization_config={"bits": 4}), "quantised"),
    "hf: overlapping tensors": (_header(_overlap), "hole|overlaps"),
    "hf: wrong size": (
        _header(lambda t: t["pooler.dense.bias"].update(shape=[9])), "does not fit"
    ),
    "hf: wrong offsets": (
        _header(lambda t: t["pooler.dense.bias"].update(data_offsets=[0, 2**60])), "does not fit"
    ),
    "hf: unknown type of number": (
        _header(lambda t: t["pooler.dense.bias"].update(dtype="F1")), "bad entry"
    ),
    "hf: shard missing": (_index({"weight_map": {"a": "model-1.safetensors"}}), "is missing"),
    "hf: shard with an endless name": (_index({"weight_map": {"a": "x" * 5000}}), "is missing"),
    "hf: shard elsewhere": (_index({"weight_map": {"a": "../../x.safetensors"}}), "outside"),
    "hf: index is none": (_index({"weights": {}}), "not an index"),
    "hf: weights of another size": (_config(intermediate_size=24), "intermediate.dense"),
    "hf: weights that are missing": (_config(num_hidden_layers=3), "encoder.layer.2"),
    "hf: a weight is missing": (_header(_rename), "1 weights are missing"),
    "hf: a weight is transposed": (_header(_transpose), r"\(8, 11\), config.* \(11, 8\)"),
    "hf: weights of another vocabulary": (_config(vocab_size=12), "word_embeddings"),
    "hf: weights of another width": (_config(hidden_size=16), "has the shape"),
    "hf: heads that do not divide": (_config(num_attention_heads=3), "not a multiple"),
}  # fmt: skip
"""What it is -> (what makes it, words of the reason)."""
