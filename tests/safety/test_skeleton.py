"""What the skeleton says of a folder is what transformers says, or nothing."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING
from transformers.models.auto.configuration_auto import model_type_to_module_name

from redpass.checks import folder as checks
from redpass.checks import installed, safetensors, skeleton, skeleton_modules, source, stand_ins
from redpass.errors import LoadError
from redpass.frontend import huggingface

SMALL = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 48, "max_position_embeddings": 32,
}  # fmt: skip
GROUPED = SMALL | {"num_key_value_heads": 2, "head_dim": 8}
MODELS: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": GROUPED,
    "Qwen2ForCausalLM": GROUPED | {"tie_word_embeddings": True},
    "Qwen3ForCausalLM": GROUPED,
    "GemmaForCausalLM": GROUPED,
    "MistralForCausalLM": GROUPED,
    "MixtralForCausalLM": GROUPED | {"num_local_experts": 4},
    "PhiForCausalLM": SMALL,
    "GPTNeoXForCausalLM": SMALL,
    "GPT2LMHeadModel": {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4},
    "OPTForCausalLM": SMALL | {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "BertForMaskedLM": SMALL,
    "RobertaModel": SMALL,
    "DistilBertModel": {"vocab_size": 64, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48},
    "T5ForConditionalGeneration": {
        "vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4,
    },
    "ViTForImageClassification": SMALL | {"image_size": 16, "patch_size": 4},
}  # fmt: skip
SAVED = [
    ("LlamaForCausalLM", True), ("Qwen2ForCausalLM", False), ("Qwen2ForCausalLM", True),
    ("MixtralForCausalLM", False), ("GPT2LMHeadModel", False), ("RobertaModel", False),
    ("T5ForConditionalGeneration", True), ("ViTForImageClassification", False),
]  # fmt: skip
"""Models, in one file or in shards."""


@pytest.fixture(scope="session")
def modules() -> Iterator[installed.Installed]:
    with skeleton_modules.installed() as found:
        yield found


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    home = tmp_path_factory.mktemp("saved")

    def save(name: str) -> Path:
        if not (home / name).exists():
            kind = getattr(transformers, name)
            torch.manual_seed(0)
            kind(kind.config_class(**MODELS[name])).save_pretrained(home / name)
        return home / name

    return save


def real(kind: Any, config: Any) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a model, built by PyTorch on no device."""
    try:
        with torch.device("meta"):
            model = kind._from_config(config, attn_implementation="sdpa")
    except ValueError:
        with torch.device("meta"):
            model = kind._from_config(config, attn_implementation="eager")
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


def drawn(modules: installed.Installed, raw: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    model = skeleton.build(modules, raw, Path("somewhere"))
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


@pytest.mark.parametrize("name", MODELS)
def test_names_and_shapes_are_those_of_the_model(name: str, modules: installed.Installed) -> None:
    kind = getattr(transformers, name)
    config = kind.config_class(**MODELS[name], architectures=[name])
    raw = json.loads(config.to_json_string())
    assert drawn(modules, raw) == real(kind, config)


@pytest.mark.parametrize(("name", "shards"), SAVED)
def test_what_transformers_saved_is_not_refused(
    name: str, shards: bool, saved: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = saved(name)
    if shards:
        model = getattr(transformers, name).from_pretrained(folder)
        model.save_pretrained(tmp_path / "model", max_shard_size="20KB")
        folder = tmp_path / "model"
        assert len(list(folder.glob("*.safetensors"))) > 1
    config, _ = checks.read_config(folder / "config.json")
    tensors = safetensors.check_folder(folder)
    report = skeleton.compare(config, tensors, folder)
    assert not report["missing_keys"]
    assert not report["mismatched_keys"]
    source.check(folder)
    huggingface.open_folder(folder)


def config_with(**values: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return change


def tensors_with(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        tensors = change(tensors) or tensors
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    return edit


def other_shape(tensors: dict[str, Any]) -> None:
    name = sorted(tensors)[3]
    tensors[name] = torch.zeros([size + 1 for size in tensors[name].shape])


CHANGES = {
    "vocabulary": config_with(vocab_size=65),
    "width": config_with(hidden_size=64),
    "a layer more": config_with(num_hidden_layers=3),
    "a layer less": config_with(num_hidden_layers=1),
    "inner width": config_with(intermediate_size=40),
    "heads": config_with(num_attention_heads=8),
    "heads that do not divide": config_with(num_attention_heads=3),
    "heads of keys": config_with(num_key_value_heads=1),
    "experts": config_with(num_local_experts=8),
    "tied": config_with(tie_word_embeddings=True),
    "not tied": config_with(tie_word_embeddings=False),
    "no class": config_with(architectures=None),
    "a weight less": tensors_with(lambda tensors: tensors.pop(sorted(tensors)[0]) is None),
    "a weight more": tensors_with(lambda tensors: tensors | {"unused": torch.zeros(2)}),
    "another shape": tensors_with(other_shape),
    "the prefix stripped": tensors_with(
        lambda tensors: {name.removeprefix("model.").removeprefix("bert."): value
                         for name, value in tensors.items()}
    ),
    "old names": tensors_with(
        lambda tensors: {name.replace("LayerNorm.weight", "LayerNorm.gamma"): value
                         for name, value in tensors.items()}
    ),
}  # fmt: skip


def said(check: Callable[[Path], Any], folder: Path) -> str:
    try:
        check(folder)
    except LoadError as error:
        return str(error)
    return "nothing"


TOLD = {
    "LlamaForCausalLM": ("vocabulary", "width", "a layer more", "heads that do not divide", "tied"),
    "Qwen2ForCausalLM": ("not tied", "no class", "a layer less"),
    "MixtralForCausalLM": ("inner width", "experts", "a weight less", "the prefix stripped"),
    "BertForMaskedLM": ("heads that do not divide", "another shape", "old names", "a weight more"),
}
"""Models, and changes of which the skeleton tells what becomes of them."""


@pytest.mark.parametrize(
    ("name", "change"), [(m, c) for m, changes in TOLD.items() for c in changes]
)
def test_it_says_the_words_of_the_loader(
    name: str, change: str, saved: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(saved(name), tmp_path / "model")
    CHANGES[change](folder)
    assert said(checks.check, folder) == said(huggingface.open_folder, folder)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_it_says_the_words_of_the_loader_or_none(
    name: str, saved: Callable[[str], Path], tmp_path: Path
) -> None:
    silent = 0
    for number, (change, make) in enumerate(CHANGES.items()):
        folder = shutil.copytree(saved(name), tmp_path / str(number))
        make(folder)
        quick, slow = said(checks.check, folder), said(huggingface.open_folder, folder)
        assert quick in ("nothing", slow), change
        silent += quick != slow
    assert silent <= 1


def test_what_it_cannot_tell_the_loader_does(
    saved: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def compare(*_: object) -> Any:
        raise stand_ins.Undecided

    folder = shutil.copytree(saved("BertForMaskedLM"), tmp_path / "model")
    CHANGES["inner width"](folder)
    told = said(checks.check, folder)
    monkeypatch.setattr(skeleton, "compare", compare)
    assert said(checks.check, folder) == "nothing"
    assert said(huggingface.open_folder, folder) == told != "nothing"


@pytest.mark.parametrize(
    ("file", "config"),
    [("adapter_config.json", {}), (None, {"transformers_weights": "other.safetensors"})],
)
def test_weights_in_other_files_are_left_to_the_loader(
    file: str | None, config: dict[str, Any], saved: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(saved("BertForMaskedLM"), tmp_path / "model")
    config_with(intermediate_size=40, **config)(folder)
    if file:
        (folder / file).write_text("{}")
    assert said(checks.check, folder) == "nothing"


def test_a_layer_changed_by_a_function_is_left_to_the_loader(modules: installed.Installed) -> None:
    """Parametrisations rename weights; the skeleton does not know how."""
    config = CONFIG_MAPPING["wav2vec2"](architectures=["Wav2Vec2Model"], num_hidden_layers=1)
    with pytest.raises(stand_ins.Undecided, match="weight_norm"):
        drawn(modules, json.loads(config.to_json_string()))


@pytest.mark.parametrize(
    "values", [{"num_hidden_layers": 4000}, {"architectures": ["(a+)+$"]}, {"num_labels": 10**12}]
)
def test_a_configuration_made_to_keep_it_busy_is_left_alone(
    values: dict[str, Any], saved: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(saved("LlamaForCausalLM"), tmp_path / "model")
    config_with(**values)(folder)
    assert said(checks.check, folder) == "nothing"


def test_nothing_of_it_stays_behind(saved: Callable[[str], Path]) -> None:
    before = set(sys.modules)
    source.check(saved("LlamaForCausalLM"))
    assert not [name for name in set(sys.modules) - before if name.startswith(installed.PREFIX)]


def every_class(kind: str) -> Iterator[tuple[str, Any]]:
    """The model classes of a type, by the name transformers offers them under."""
    package = f"transformers.models.{model_type_to_module_name(kind)}"
    for name in dir(sys.modules.get(package) or __import__(package, fromlist=["x"])):
        found = getattr(transformers, name, None)
        if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
            yield name, found


@pytest.mark.slow
def test_no_model_type_is_drawn_wrong(modules: installed.Installed) -> None:
    told, left = 0, 0
    for kind in CONFIG_MAPPING:
        try:
            raw = json.loads(CONFIG_MAPPING[kind]().to_json_string())
            classes = [
                (name, found)
                for name, found in every_class(kind)
                if isinstance(CONFIG_MAPPING[kind](), found.config_class or ())
                and not name.endswith("PreTrainedModel")
            ]
        except Exception:  # a type without defaults, or one that needs other packages
            continue
        for name, found in classes:
            try:
                wanted = real(found, CONFIG_MAPPING[kind].from_dict(dict(raw)))
            except Exception:
                continue
            try:
                drawing = drawn(modules, raw | {"model_type": kind, "architectures": [name]})
            except (stand_ins.Undecided, Exception):
                left += 1
                continue
            assert drawing == wanted, (kind, name)
            told += 1
    assert told > 2 * left, (told, left)
