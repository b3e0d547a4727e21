"""Whether weights belong to a configuration, told without importing PyTorch or transformers.

Which tensors a configuration asks for, and how names in a file become names in a model, only
transformers says. Its own source does so here: the model class is built of shapes, and the loading
code of transformers is given the shapes in the files. Whatever that code asks beyond shapes leaves
the question open, for the real loading to answer.
"""

from __future__ import annotations

import copy
import linecache
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from redpass.checks import shapes, skeleton_modules
from redpass.checks.installed import Installed
from redpass.checks.stand_ins import Undecided
from redpass.errors import LoadError

HINT = "the weights and config.json must belong together"

MOST = 5_000
"""Tensors up to which this takes a fraction of a second; loading more takes minutes anyway."""

ELSEWHERE = re.compile(r"adapter_config\.json|shard-\d+-model-.*\.safetensors")
"""Files beside the weights that make transformers load something else."""


def check(config: Mapping[str, Any], found: Mapping[str, tuple[int, ...]], folder: Path) -> None:
    """Refuses weights that do not belong to a configuration, where that can be told.

    Args:
        config: as `folder.read_config` returns it.
        found: name of each tensor in the files -> its shape.

    Raises:
        LoadError: weights of other shapes, weights that are missing, or a configuration that
            transformers refuses.
    """
    labels = config.get("num_labels")
    if isinstance(labels, int) and labels > MOST:  # each would get a name
        return
    if len(found) > MOST or any(ELSEWHERE.fullmatch(path.name) for path in folder.iterdir()):
        return
    try:
        report = compare(config, found, folder)
    except LoadError:
        raise
    except (Undecided, Exception):
        return  # the real loading says what is wrong, if anything is
    if not only_pooler(report["missing_keys"]):
        refuse(report, folder)


def refuse(report: Mapping[str, Any], folder: Path) -> None:
    """Refuses weights that transformers would fill with random numbers.

    Args:
        report: as transformers gives it: `mismatched_keys` (name, shape, shape asked for) and
            `missing_keys`.

    Raises:
        LoadError: there are some.
    """
    for name, *sizes in sorted(report.get("mismatched_keys", ())):
        given, wanted = (tuple(size) for size in sizes)
        found = f"has the shape {given}, config.json asks for {wanted}"
        raise LoadError(found, file=folder, place=name, hint=HINT)
    missing = sorted(report["missing_keys"])
    if missing:
        found = f"{len(missing)} weights are missing: {', '.join(missing[:5])}"
        raise LoadError(found, file=folder, hint=HINT)


def only_pooler(missing: Any) -> bool:
    """Whether all that is missing belongs to a pooler, which a model can do without."""
    return bool(missing) and all("pooler." in name for name in missing)


def refused_config(error: Exception, folder: Path) -> LoadError:
    """Returns the error for a configuration that transformers refuses."""
    found, hint = f"the configuration is refused: {short(error)}", "save the model again"
    return LoadError(found, file=folder / "config.json", hint=f"{hint} with save_pretrained")


def refused_model(error: Exception, folder: Path) -> LoadError:
    """Returns the error for a model that transformers cannot build or load."""
    found = f"transformers cannot load the weights: {short(error)}"
    return LoadError(found, file=folder, hint=HINT)


def short(error: Exception) -> str:
    """Returns the words of an error on one line."""
    return " ".join(str(error).split())[:500]


def compare(
    raw: Mapping[str, Any], found: Mapping[str, tuple[int, ...]], folder: Path
) -> Mapping[str, Any]:
    """Returns what transformers would report on loading tensors of these shapes.

    Raises:
        LoadError: the model cannot be built.
        Undecided, Exception: it cannot be told.
    """
    with warnings.catch_warnings(), skeleton_modules.installed() as modules:
        warnings.simplefilter("ignore")
        model = build(modules, raw, folder)
        utils = modules.load("transformers.modeling_utils")
        mapping = modules.load("transformers.conversion_mapping")
        how = utils.LoadStateDictConfig(
            pretrained_model_name_or_path="",
            ignore_mismatched_sizes=True,
            dtype=shapes.FLOAT,
            weight_mapping=mapping.get_model_conversion_mapping(model),
        )
        state = {name: shapes.Tensor(shape) for name, shape in found.items()}
        report, _ = model._load_pretrained_model(model, state, None, how)
        told: Mapping[str, Any] = model._finalize_model_loading(model, how, report).to_dict()
        return told


def build(modules: Installed, raw: Mapping[str, Any], folder: Path) -> Any:
    """Returns the model that a configuration describes, its weights being shapes.

    Raises:
        LoadError: transformers says on purpose that it cannot be built.
        Undecided, Exception: it cannot be told.
    """
    try:
        return _build(modules, raw, "sdpa", folder)
    except skeleton_modules.NoFusedAttentionError:
        return _build(modules, raw, "eager", folder)


def _build(modules: Installed, raw: Mapping[str, Any], attention: str, folder: Path) -> Any:
    auto = modules.load("transformers.models.auto.configuration_auto")
    try:
        config = auto.CONFIG_MAPPING[raw["model_type"]].from_dict(copy.deepcopy(dict(raw)))
    except Exception as error:
        raise refused_config(error, folder) if _is_meant(error) else error from error
    config._attn_implementation = attention
    if type(config).extra_files or hasattr(config, "transformers_weights"):
        raise Undecided("weights in other files")
    kind = _model_class(modules, raw, config)
    try:
        return kind(config)
    except ValueError as error:
        raise refused_model(error, folder) if _is_meant(error) else error from error


def _is_meant(error: BaseException) -> bool:
    """Whether an error is one that a configuration or a model raises itself."""
    if type(error).__name__ == "StrictDataclassClassValidationError" and error.__cause__:
        error = error.__cause__
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    if frame is None or not isinstance(error, ValueError):
        return False
    file = Path(frame.tb_frame.f_code.co_filename)
    line = linecache.getline(str(file), frame.tb_lineno).strip()
    homes = ("transformers/models/*/*.py", "transformers/configuration_utils.py")
    is_raised = line.startswith("raise ValueError(") and any(map(file.match, homes))
    return is_raised and "implementation" not in str(error)  # another may be tried


def _model_class(modules: Installed, raw: Mapping[str, Any], config: Any) -> Any:
    base = modules.load("transformers.modeling_utils").PreTrainedModel
    names = raw.get("architectures")
    for name in names if isinstance(names, list) else ():
        found = skeleton_modules.model_class(modules, raw["model_type"], name)
        if issubclass(found, base) and isinstance(config, found.config_class or ()):
            return found
    return modules.load("transformers.models.auto.modeling_auto").MODEL_MAPPING[type(config)]
