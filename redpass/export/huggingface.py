"""Hugging Face folders: a result that plain transformers or diffusers loads, where one can.

One architecture has one layout of weights. Fewer layers fit it, other widths where its
configuration names them, and other values of the same parameters; a rewritten graph does not. So
the folder is written from the loaded model with the approximate actions alone (exact rewrites
change no result), and is then compared with the result.
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from redpass.errors import ExportError, RedpassError
from redpass.export.check import Report, check_outputs
from redpass.export.layouts import Layout, fit
from redpass.export.narrower import Config, Shapes
from redpass.export.surviving import Surviving, surviving
from redpass.frontend import adapt, causal, huggingface
from redpass.frontend.outputs import flatten
from redpass.program import Program

WEIGHTS = frozenset(
    {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf", ".ot"}
)
CODE = frozenset({".py", ".pyc", ".sh", ".so"})
NOT_COPIED = frozenset({"config.json", "generation_config.json", "model_index.json"})
LARGEST = 64 << 20
"""Bytes of a file that is copied beside the weights: a large tokenizer has 30 MB."""


def to_huggingface(program: Program, path: str | Path) -> Report:
    """Writes `program` as a folder that the source's own library loads, and compares the two.

    Args:
        path: the folder to make; its parent exists. It is gone again when this fails.

    Raises:
        ExportError: the source is no Hugging Face folder, its architecture has no words for the
            result (names what is in the way), or what was written gives other results.
    """
    path = Path(path)
    source = _check_source(program)
    module = huggingface.open_folder(source).module
    left = _left(program)
    values = _values(module, left)
    layout = _layout(module, left, values, by_heads=True)
    try:
        return _written(program, source, module, layout, values, path)
    except ExportError:
        other = _layout(module, left, values, by_heads=False)
        if other.config == layout.config:
            raise
        return _written(program, source, module, other, values, path)


def holder(program: Program) -> Callable[[Program], str]:
    """Returns what says why no folder can hold a program made from `program`, or "".

    Nothing is written. What it lets pass is still compared when it is written.

    Raises:
        ExportError: the source is no Hugging Face folder.
    """
    module = huggingface.open_folder(_check_source(program)).module

    def why(found: Program) -> str:
        try:
            left = _left(found)
            _layout(module, left, _values(module, left), by_heads=True)
        except ExportError as error:
            return f"{error.place}: {error.found}" if error.place else error.found
        return ""

    return why


def _written(
    program: Program,
    source: Path,
    module: nn.Module,
    layout: Layout,
    values: Mapping[str, Tensor],
    path: Path,
) -> Report:
    """Writes one layout and checks it; the folder is gone again when that fails."""
    path.mkdir()
    try:
        _write(module, layout, values, path)
        _copy_rest(source, path)
        notes = _notes(program, layout, module)
        return check_outputs(program, _runner(program, path), path, notes)
    except BaseException:
        shutil.rmtree(path, ignore_errors=True)
        raise


def _check_source(program: Program) -> Path:
    if program.origin.kind != "huggingface":
        raise ExportError(
            f"the model came from a {program.origin.kind}, not from a Hugging Face folder",
            hint="load the folder, or write pt2 or onnx",
        )
    if program.is_fake:
        raise ExportError("the weights carry no data", hint="load the model without fake=True")
    return Path(program.origin.path)


def _left(program: Program) -> Surviving:
    """What is left of the parameters; without approximate actions that is all of them."""
    lineage = program.lineage
    if lineage is None:
        return Surviving({}, frozenset())
    if lineage.plain is None:
        raise ExportError(
            f"the actions cannot be repeated on the model as it was loaded: {lineage.fault}"
        )
    return surviving(lineage.source, lineage.plain)


def _layout(
    module: nn.Module, left: Surviving, values: Mapping[str, Tensor], *, by_heads: bool
) -> Layout:
    shapes = {name: tuple(value.shape) for name, value in values.items()}
    unknown = left.gone - shapes.keys()
    if unknown:
        text = "is no parameter of the model in the folder"
        raise ExportError(text, place=sorted(unknown)[0], hint="only a part of it was loaded")
    return fit(
        _config(module),
        shapes,
        left.gone,
        lambda config: _shapes(_empty(module, config)),
        by_heads=by_heads,
    )


def _shapes(module: nn.Module) -> Shapes:
    return {name: tuple(value.shape) for name, value in module.state_dict().items()}


def _config(module: Any) -> Config:
    """The configuration with every value spelt out, derived ones too."""
    if adapt.is_diffusers(module):
        return {k: v for k, v in dict(module.config).items() if not k.startswith("_")}
    return dict(module.config.to_dict())


def _empty(module: Any, config: Config) -> Any:
    """Builds the same kind of model from another configuration, without memory for weights."""
    with torch.device("meta"), warnings.catch_warnings(), huggingface.quiet():
        warnings.simplefilter("ignore")
        if adapt.is_diffusers(module):
            return type(module).from_config(config)
        made = type(module.config).from_dict(config)
        return type(module)._from_config(made, dtype=module.dtype)


def _write(module: Any, layout: Layout, values: Mapping[str, Tensor], path: Path) -> None:
    shell = _empty(module, layout.config)
    state = {new: values[old] for old, new in layout.names.items()}
    shell.load_state_dict(state, assign=True, strict=False)
    if hasattr(module, "generation_config"):
        shell.generation_config = module.generation_config
    if hasattr(shell, "tie_weights"):
        shell.tie_weights()
    try:
        with huggingface.quiet():
            shell.save_pretrained(path)
    except (RuntimeError, ValueError) as error:
        raise ExportError(f"the library cannot write it: {error}", file=path) from error


def _values(module: nn.Module, left: Surviving) -> dict[str, Tensor]:
    """The parameters' values now.

    Names that share memory in the source share their new value. What only the result shares is
    written once for each name: a folder has no word for it.
    """
    old = module.state_dict()
    changed: dict[Any, Tensor] = {}
    for name in left.values.keys() & old.keys():
        if changed.setdefault(_place(old[name]), left.values[name]) is not left.values[name]:
            raise ExportError("is tied in the source and has two values now", place=name)
    taken: set[Any] = set()
    for place, value in changed.items():
        changed[place] = value.detach().clone() if _place(value) in taken else value.detach()
        taken.add(_place(value))
    return {name: changed.get(_place(value), value) for name, value in old.items()}


def _place(value: Tensor) -> tuple[Any, ...]:
    return value.data_ptr(), tuple(value.shape), value.stride()


def _copy_rest(source: Path, path: Path) -> None:
    """Copies what lies beside the weights: tokenizer, templates, processors, licence."""
    for file in sorted(source.rglob("*")):
        inner = file.relative_to(source)
        hidden = any(part.startswith(".") for part in inner.parts)
        if not file.is_file() or hidden or len(inner.parts) > 2:
            continue
        foreign = {file.suffix, Path(file.stem).suffix} & (WEIGHTS | CODE)
        if foreign or file.name in NOT_COPIED or file.stat().st_size > LARGEST:
            continue
        target = path / inner
        if not target.exists():
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, target)


def _notes(program: Program, layout: Layout, module: nn.Module) -> tuple[str, ...]:
    gone = len(module.state_dict()) - len(layout.names)
    exact = sum(len(step.actions) for step in program.steps)
    words = [f"{gone} parameters fewer than the source"] if gone else []
    if exact and program.lineage is None:
        words.append("exact rewrites cannot be told in this form: the weights are the source's")
    return tuple(words)


def _runner(program: Program, path: Path) -> Callable[[dict[str, Tensor]], Mapping[str, Tensor]]:
    """Loads the folder as a user would and returns it as a function of the program's inputs."""
    try:
        module = huggingface.open_folder(path).module
    except RedpassError as error:
        raise ExportError(f"what was written does not load: {error.found}", file=path) from error
    names = _cache_names(program)

    def run(values: dict[str, Tensor]) -> Mapping[str, Tensor]:
        with torch.no_grad():
            if not names:
                return flatten(adapt.call_plain(module, values))[0]
            found = causal.call(module, {names.get(k, k): v for k, v in values.items()})
        back = {new: old for old, new in names.items()}
        return {back.get(name, name): value for name, value in found.items()}

    return run


def _cache_names(program: Program) -> dict[str, str]:
    """Port of the cache -> what the model's own layers call it, layers numbered in order."""
    names: dict[str, str] = {}
    for number, (before, after) in enumerate(program.signature.state):
        part = ("key", "value")[number % 2]
        names[before] = causal.key_name(number // 2, part, past=True)
        names[after] = causal.key_name(number // 2, part, past=False)
    return names
