"""`load`: one door for every source of a model."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from redpass.checks.input_specs import FORM, parse_all
from redpass.checks.source import existing, unknown
from redpass.errors import RedpassError, UsageError
from redpass.frontend import adapt, batches, huggingface, pickled, pt2, pt2_ports, specs
from redpass.frontend.adapt import Adapted
from redpass.frontend.trace import finish, forward_fails, trace, warn_of_nan
from redpass.program import Origin, Program

Example = Mapping[str, Tensor] | Sequence[Tensor]


def load(
    source: nn.Module | str | Path,
    *,
    example: Example | None = None,
    inputs: Sequence[str] = (),
    data: str | Path | None = None,
    tokenizer: Any = None,
    task: str | None = None,
    module: str | None = None,
    allow: Sequence[str] = (),
    trust_file: bool = False,
    fake: bool = False,
) -> Program:
    """Loads a model and traces it to a `Program`. Runs no code that comes with the file.

    Args:
        source: a module; a Hugging Face folder; a `.pt2`; or a `.pt`/`.pth`.
        example: example inputs by name, or as the forward's positional arguments.
        inputs: what the inputs look like, such as `input_ids:int64[batch,seq]`.
        data: a file whose first rows serve as example inputs.
        tokenizer: for `data` that is text: a folder or a tokenizer.
        task: overrides what the source says it does.
        module: `package.module:factory` that builds the module for a bare state dict.
        allow: classes a pickle may name besides PyTorch's own, as `package.Class`.
        trust_file: reads a `.pt` or `.pt2` without checks, which lets it run any code it holds.
            The only way round a refusal; code beside a Hugging Face folder is never run.
        fake: trace on the meta device; the weights carry no data.

    Raises:
        LoadError: a file that is missing, damaged or refused.
        TraceError: the model cannot be run on its example inputs, or cannot be traced.
        UsageError: options that do not fit each other.
    """
    if isinstance(source, nn.Module):
        origin = Origin("module", f"{type(source).__module__}.{type(source).__qualname__}")
        return _trace(source, origin, example, inputs, task, fake)
    path = existing(Path(source))
    if path.suffix == ".pt2":
        return _from_pt2(path, task, trust=trust_file)
    opened = _open(path, module, allow, trust_file, fake)
    origin = Origin(opened.kind, str(path), config=opened.config, notes=opened.notes)
    given = example if example is not None or data is None else _from_file(path, data, tokenizer)
    if opened.kind == "pt" and given is None and not inputs and not _is_known(opened.module):
        raise UsageError(
            "a pickled module does not say what its inputs look like",
            file=path,
            hint=f"{FORM} with --input (inputs=...), or pass example=...",
        )
    return _trace(opened.module, origin, given, inputs, task, fake)


@dataclass(frozen=True)
class _Opened:
    module: nn.Module
    kind: str
    config: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def _open(
    path: Path, module: str | None, allow: Sequence[str], trust_file: bool, fake: bool
) -> _Opened:
    if path.is_dir():
        folder = huggingface.open_folder(path, fake=fake)
        return _Opened(folder.module, "huggingface", folder.config, folder.notes)
    if path.suffix in (".pt", ".pth"):
        loaded = pickled.load_pickled(path, allow=allow, trust=trust_file)
        return _Opened(pickled.build(path, loaded, module), "pt")
    raise unknown(path)


def _from_file(path: Path, data: str | Path, tokenizer: Any) -> Example:
    reader = tokenizer if tokenizer is not None or not path.is_dir() else path
    return batches.read_rows(Path(data), tokenizer=reader, limit=2)


def _is_known(module: nn.Module) -> bool:
    return adapt.is_transformers(module) or adapt.is_diffusers(module)


def exported(program: torch.export.ExportedProgram, origin: Origin) -> Program:
    """Returns an exported program in core form, with its dimensions named.

    Raises:
        TraceError: it writes to a buffer, or holds control flow.
        LoadError: an input that is no tensor.
    """
    dims, outputs = pt2_ports.describe(program)
    found = finish(program, dims, outputs, origin, prefix="")
    warn_of_nan(found.weights)
    return found


def _from_pt2(path: Path, task: str | None, *, trust: bool) -> Program:
    graph, stored = pt2.load_exported(path, trust=trust), pt2.read_stored(path)
    if stored is None:
        return exported(graph, Origin("pt2", str(path), task=task or "unknown"))
    ports = stored.signature
    origin = Origin("pt2", str(path), task=task or stored.task)
    dims = pt2_ports.stored_dims(graph, ports, path)
    program = finish(graph, dims, tuple(port.name for port in ports.outputs), origin, prefix="")
    warn_of_nan(program.weights)
    return replace(program, signature=replace(program.signature, state=ports.state))


def _trace(
    module: nn.Module,
    origin: Origin,
    example: Example | None,
    inputs: Sequence[str],
    task: str | None,
    fake: bool,
) -> Program:
    adapted = _adapt(module, example, inputs)
    origin = replace(origin, task=task or adapted.task, notes=(*origin.notes, *adapted.notes))
    with adapt.plain_experts(module):
        program = trace(
            adapted.module,
            adapted.example,
            dims=adapted.dims,
            state=adapted.state,
            origin=origin,
            call=adapted.call,
            ranges=adapted.ranges,
        )
    if fake:
        return _without_data(program)
    if inputs or example is not None:
        _check_run(program, adapted.example)
    return program


def _check_run(program: Program, example: Mapping[str, Tensor]) -> None:
    """Raises `TraceError` for inputs of a dtype that traces and cannot be run."""
    if program.is_fake:
        return
    try:
        program(**example)
    except RedpassError:
        return  # a size that was lengthened to be traced and turned out to be fixed
    except Exception as error:
        raise forward_fails(example, error) from error


def _without_data(program: Program) -> Program:
    weights = {name: value.to("meta") for name, value in program.weights.items()}
    return replace(program, weights=weights, origin=replace(program.origin, digest=""))


def _adapt(module: nn.Module, example: Example | None, inputs: Sequence[str]) -> Adapted:
    described = parse_all(inputs)
    if described:
        values = specs.example(described) if example is None else _by_name(module, example)
        return Adapted(module, values, {spec.name: spec.axes for spec in described})
    if example is not None:
        values = _by_name(module, example)
        return Adapted(module, values, guess_dims(values))
    if adapt.is_transformers(module):
        return adapt.adapt_transformers(module)
    if adapt.is_diffusers(module):
        return adapt.adapt_diffusers(module)
    raise UsageError(
        "a module needs example inputs",
        hint="pass example={'name': tensor}, or inputs=['name:float32[batch,16]']",
    )


def _by_name(module: nn.Module, example: Example) -> dict[str, Tensor]:
    if isinstance(example, Mapping):
        return dict(example)
    if isinstance(example, Tensor):
        example = (example,)
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(module.forward).parameters.values()
    names = [p.name for p in parameters if p.kind in kinds]
    if len(example) > len(names):
        raise UsageError(
            f"{len(example)} example inputs for a forward that takes {len(names)}",
            hint="pass example={'name': tensor}",
        )
    return dict(zip(names, example, strict=False))


def guess_dims(values: Mapping[str, Tensor]) -> dict[str, tuple[str | int, ...]]:
    """Names the axes of example inputs nobody described.

    The first axis is `batch` when all inputs agree on it; the second of a rank-2 integer input
    is `seq`, and of any other input of rank 2 or 3 with the same size.
    """
    first = {value.shape[0] for value in values.values() if value.dim()}
    length = next(
        (v.shape[1] for v in values.values() if v.dim() == 2 and v.dtype in INDEX_TYPES), None
    )
    dims: dict[str, tuple[str | int, ...]] = {}
    for name, value in values.items():
        axes: list[str | int] = list(value.shape)
        if axes and len(first) == 1:
            axes[0] = "batch"
        if length is not None and value.dim() in (2, 3) and axes[1] == length:
            axes[1] = "seq"
        dims[name] = tuple(axes)
    return dims


INDEX_TYPES = (torch.int64, torch.int32)
