"""Hugging Face folders: encoders, vision, audio, denoisers; and folders that are damaged."""

import json
import logging
import os
import re
import shutil
from importlib import import_module

import pytest
import torch

from redpass.errors import LoadError
from redpass.frontend import load, random_inputs
from redpass.frontend.huggingface import open_folder

transformers = pytest.importorskip("transformers")
huggingface_hub = pytest.importorskip("huggingface_hub")
SIZE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
TEXT = {**SIZE, "vocab_size": 96, "max_position_embeddings": 64}
IMAGE = {**SIZE, "image_size": 32, "patch_size": 8}
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GLOBAL = {
    "global_attn_every_n_layers": 2,
    "local_attention": 4,
    "cls_token_id": 1,
    "sep_token_id": 2,
}
AUDIO = {
    "d_model": 32, "encoder_layers": 2, "decoder_layers": 1, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "vocab_size": 96,
    "max_source_positions": 30, "num_mel_bins": 16, "decoder_start_token_id": 1,
}  # fmt: skip
MODELS = {
    "bert": ("BertModel", TEXT),
    "mpnet": ("MPNetModel", TEXT),
    "modernbert": ("ModernBertModel", {**TEXT, **IDS, **GLOBAL}),
    "vit": ("ViTForImageClassification", IMAGE),
    "dinov2": ("Dinov2Model", IMAGE),
    "whisper": ("WhisperForConditionalGeneration", {**IDS, **AUDIO}),
}


def save(name, folder):
    torch.manual_seed(0)
    kind, settings = MODELS[name]
    cls = getattr(transformers, kind)
    model = cls(cls.config_class(**settings)).eval()
    model.save_pretrained(folder)
    return model


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bert")
    return save("bert", folder), folder


@pytest.fixture
def copy(bert, tmp_path):
    return shutil.copytree(bert[1], tmp_path / "model")


@pytest.mark.parametrize("name", MODELS)
def test_a_folder_gives_what_transformers_gives(name, tmp_path):
    model = save(name, tmp_path)
    program = load(tmp_path)
    reference = model.get_encoder() if name == "whisper" else model
    for batch, seq in ((1, 1), (3, 9)):
        sizes = {"batch": batch, "seq": seq}
        inputs = random_inputs(program, {k: sizes[k] for k in program.signature.dims})
        if "attention_mask" in inputs and seq > 1:
            inputs["attention_mask"][0, 5:] = 0
        with torch.no_grad():
            expected = reference(**inputs)
        for port, value in zip(program.signature.outputs, program(**inputs), strict=True):
            assert (value - expected[port.name]).abs().max() <= 1e-6 * expected[
                port.name
            ].abs().max()


def test_what_a_folder_says_about_itself(bert):
    program = load(bert[1])
    assert program.origin.kind == "huggingface"
    assert program.origin.config["hidden_size"] == 32
    assert [p.name for p in program.signature.outputs] == ["last_hidden_state", "pooler_output"]
    assert program.signature.dims == {"batch": (1, None), "seq": (1, 64)}


@pytest.fixture(scope="module")
def denoiser(tmp_path_factory):
    diffusers = pytest.importorskip("diffusers")
    folder = tmp_path_factory.mktemp("denoiser")
    torch.manual_seed(0)
    model = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, num_layers=2, sample_size=8,
        patch_size=2, num_embeds_ada_norm=10, norm_num_groups=4,
    ).eval()  # fmt: skip
    model.save_pretrained(folder)
    return model, folder


def test_a_denoiser_of_diffusers(denoiser):
    model, folder = denoiser
    program = load(folder)
    assert program.origin.task == "denoiser"
    assert [p.name for p in program.signature.inputs] == [
        "hidden_states",
        "timestep",
        "class_labels",
    ]
    inputs = random_inputs(program, {"batch": 3})
    with torch.no_grad():
        expected = model(**inputs).sample
    assert (program(**inputs)[0] - expected).abs().max() <= 1e-5


@pytest.mark.parametrize("library", ["transformers", "diffusers"])
@pytest.mark.parametrize("bars", [True, False])
def test_libraries_are_silent_and_their_settings_stay(library, bars, bert, request, capfd):
    folder = (bert if library == "transformers" else request.getfixturevalue("denoiser"))[1]
    log = import_module(f"{library}.utils.logging")
    said, handler = [], logging.Handler()
    handler.emit = said.append
    log.add_handler(handler)
    shown, level = log.is_progress_bar_enabled(), log.get_verbosity()
    log.set_verbosity_warning()
    (log.enable_progress_bar if bars else log.disable_progress_bar)()
    hub = huggingface_hub.utils
    (hub.disable_progress_bars if bars else hub.enable_progress_bars)()
    try:
        open_folder(folder)
        assert capfd.readouterr() == ("", "")
        assert not [record.getMessage() for record in said]
        assert log.is_progress_bar_enabled() is bars
        assert hub.are_progress_bars_disabled() is bars
        assert log.get_verbosity() == logging.WARNING
    finally:
        log.remove_handler(handler)
        log.set_verbosity(level)
        (log.enable_progress_bar if shown else log.disable_progress_bar)()
        hub.enable_progress_bars()


def test_fake_needs_no_weights(copy):
    (copy / "model.safetensors").unlink()
    program = load(copy, fake=True)
    assert program.is_fake
    assert program.origin.digest == ""


def test_code_named_by_the_configuration_is_ignored_and_noted(copy):
    canary = copy / "canary"
    (copy / "evil.py").write_text(f"open({str(canary)!r}, 'w')\n")
    edit(copy, auto_map={"AutoModel": "evil.Model"}, _attn_implementation="somebody/kernel")
    program = load(copy)
    assert any("auto_map" in note for note in program.origin.notes)
    assert not canary.exists()


def edit(folder, **values):
    config = json.loads((folder / "config.json").read_text())
    config |= values
    (folder / "config.json").write_text(
        json.dumps({k: v for k, v in config.items() if v is not None})
    )


def test_an_unknown_model_type_is_refused(copy):
    edit(copy, model_type="mystery", auto_map={"AutoModel": "evil.Model"})
    with pytest.raises(LoadError, match=r"model_type 'mystery'.*\n.*runs no code"):
        load(copy)


def test_missing_sources(tmp_path):
    with pytest.raises(LoadError, match="no such file or folder"):
        load(tmp_path / "nowhere")
    with pytest.raises(LoadError, match=r"config\.json: no such file"):
        load(tmp_path)
    (tmp_path / "empty.pt2").touch()
    with pytest.raises(LoadError, match=r"empty\.pt2: is empty"):
        load(tmp_path / "empty.pt2")
    loop = tmp_path / "loop.pt"
    loop.symlink_to(loop)
    with pytest.raises(LoadError, match="Too many levels"):
        load(loop)
    (tmp_path / "model.bin").write_bytes(b"x")
    with pytest.raises(LoadError, match=r"'\.bin' is no model format"):
        load(tmp_path / "model.bin")


def test_a_broken_configuration(copy):
    (copy / "config.json").write_text("{")
    with pytest.raises(LoadError, match="not JSON"):
        load(copy)


def weights_of(folder):
    path = folder / "model.safetensors"
    return path, path.read_bytes()


def test_truncated_weights(copy):
    path, data = weights_of(copy)
    for size in (4, 100, len(data) - 4):
        path.write_bytes(data[:size])
        with pytest.raises(LoadError, match=r"model\.safetensors.*truncated"):
            load(copy)


def test_empty_weights_pointer_and_pickles(copy):
    path, _ = weights_of(copy)
    path.write_bytes(b"")
    with pytest.raises(LoadError, match="empty file"):
        load(copy)
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n")
    with pytest.raises(LoadError, match=r"git-lfs pointer.*\n.*git lfs pull"):
        load(copy)
    path.unlink()
    (copy / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(LoadError, match=r"only pickled weights \(pytorch_model\.bin\)"):
        load(copy)
    os.symlink("nowhere", path)
    with pytest.raises(LoadError, match="a link to a file that is not there"):
        load(copy)


def header(data):
    size = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def pack(table, rest):
    text = json.dumps(table).encode()
    return len(text).to_bytes(8, "little") + text + rest


def _shift(entry):
    entry["data_offsets"][0] += 4


def _overlap(entry):
    entry["data_offsets"] = [0, entry["data_offsets"][1] - entry["data_offsets"][0]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_shift, "does not fit"),
        (lambda entry: entry.update(shape=[-1]), "a bad entry"),
        (lambda entry: entry.update(dtype="X9"), "a bad entry"),
        (_overlap, "overlaps|hole"),
    ],
)
def test_headers_that_lie(copy, change, message):
    path, data = weights_of(copy)
    table, rest = header(data)
    change(table["encoder.layer.1.output.dense.weight"])
    path.write_bytes(pack(table, rest))
    with pytest.raises(LoadError, match=message):
        load(copy)


def test_a_name_twice_in_the_header(copy):
    path, data = weights_of(copy)
    table, rest = header(data)
    text = json.dumps(table)[:-1] + ', "pooler.dense.bias": {}}'
    path.write_bytes(len(text).to_bytes(8, "little") + text.encode() + rest)
    with pytest.raises(LoadError, match="a name occurs twice"):
        load(copy)


def test_missing_shards_and_wrong_maps(copy, bert):
    bert[0].save_pretrained(copy, max_shard_size="20KB")
    (copy / "model.safetensors").unlink()
    assert len(list(copy.glob("model-*.safetensors"))) > 1
    assert load(copy).origin.digest == load(bert[1]).origin.digest
    index = copy / "model.safetensors.index.json"
    table = json.loads(index.read_text())
    first = sorted(copy.glob("model-*.safetensors"))[0]
    table["weight_map"]["ghost"] = first.name
    index.write_text(json.dumps(table))
    with pytest.raises(LoadError, match="ghost: not in the shard"):
        load(copy)
    first.unlink()
    with pytest.raises(LoadError, match=rf"{re.escape(first.name)}: a shard is missing"):
        load(copy)


def test_sizes_that_do_not_fit_the_configuration(copy):
    edit(copy, intermediate_size=64)
    with pytest.raises(LoadError, match=r"has the shape .* asks for(.|\n)*belong together"):
        load(copy)


def test_weights_that_are_missing(copy):
    edit(copy, num_hidden_layers=3)
    with pytest.raises(LoadError, match=r"weights are missing: encoder\.layer\.2"):
        load(copy)


def test_a_folder_without_its_pooler_loses_that_output(copy):
    from safetensors.torch import load_file, save_file

    path, _ = weights_of(copy)
    state = {k: v for k, v in load_file(path).items() if not k.startswith("pooler")}
    save_file(state, path, metadata={"format": "pt"})
    assert [p.name for p in load(copy).signature.outputs] == ["last_hidden_state"]
