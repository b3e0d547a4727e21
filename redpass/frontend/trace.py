"""Traces an `nn.Module` to a `Program`.

`torch.export` in non-strict mode runs the forward once on fake tensors; `normalise` turns what
it gives into core form; `fakes` then computes every fake value anew with symbols that carry the
names of the dimensions.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from redpass import ops
from redpass.errors import RedpassError, TraceError
from redpass.frontend import fakes, normalise
from redpass.frontend.dims import DimNames, Dims, prepare
from redpass.frontend.outputs import flatten
from redpass.program import Origin, Program, Signature

Call = Callable[[nn.Module, Mapping[str, Tensor]], Any]
"""How a module is called with its inputs by name."""


def call_by_name(module: nn.Module, values: Mapping[str, Tensor]) -> Any:
    """Calls `module` with keyword arguments."""
    return module(**values)


def trace(
    module: nn.Module,
    example: Mapping[str, Tensor],
    *,
    dims: DimNames | None = None,
    state: tuple[tuple[str, str], ...] = (),
    origin: Origin,
    call: Call = call_by_name,
    ranges: Mapping[str, tuple[int, int | None]] | None = None,
) -> Program:
    """Traces `module` in eval mode; the module itself is left as it was.

    Args:
        module: any module; on the meta device for a program without weight data.
        example: input name -> tensor, in the order of the public inputs.
        dims: input name -> a name or size for each axis; names become symbolic dimensions, an
            expression such as `past + seq` follows from them. None keeps all sizes fixed.
        state: (input, output) pairs that carry state from call to call.
        origin: what the module was made from.
        call: how to call the module with the inputs by name.
        ranges: dimension name -> (smallest, largest or None); (1, None) when not given.

    Raises:
        TraceError: the forward fails on the example, writes to a buffer or an input, or holds
            something a graph cannot (control flow on data, for one).
        UsageError: `dims` and the example do not fit each other.
    """
    ready = prepare(example, dims or {}, ranges or {})
    names: list[str] = []
    notes: list[str] = list(origin.notes)
    flat = _Flat(module, tuple(ready.example), call, names, notes)
    with _eval_mode(module), torch.no_grad():
        exported, ready = _export(flat, ready, notes)
    warn_of_nan(dict(module.named_parameters()), parameters=True)
    origin = replace(origin, notes=tuple(notes))
    program = finish(exported, ready, tuple(names), origin, prefix=_Flat.PREFIX)
    _check_state(state, program.signature)
    return replace(program, signature=replace(program.signature, state=state))


def finish(
    exported: torch.export.ExportedProgram,
    dims: Dims,
    outputs: tuple[str, ...],
    origin: Origin,
    *,
    prefix: str,
) -> Program:
    """Turns an exported program into a `Program`.

    Args:
        dims: the user inputs, in order, and the names of their axes.
        outputs: the names of the user outputs.
        prefix: attribute that wraps the user's module, cut off names; "" for none.

    Raises:
        TraceError: a write to a buffer or input, control flow, or an op on symbolic sizes.
    """
    core = normalise.core_form(exported, tuple(dims.example), prefix)
    notes: list[str] = list(origin.notes)
    signature = fakes.propagate(core, dims, outputs, notes)
    notes += _random_notes(core.graph)
    origin = replace(
        origin,
        notes=tuple(dict.fromkeys(notes)),
        parameters=origin.parameters or {name: name for name in core.weights},
        digest=origin.digest or weights_digest(core.weights),
    )
    return Program(core.graph, core.weights, signature, origin)


class NaNWeightsWarning(UserWarning):
    """A weight holds NaN or infinity."""


def warn_of_nan(weights: Mapping[str, Tensor], *, parameters: bool = False) -> None:
    """Warns of each weight that holds NaN or infinity.

    Args:
        parameters: whether all are parameters; a constant may hold minus infinity, as masks do.
    """
    for name, weight in weights.items():
        if weight.is_meta or not weight.is_floating_point():
            continue
        numbers = weight.detach()
        numbers = numbers.float() if numbers.itemsize == 1 else numbers
        finite = torch.isfinite(numbers) if parameters else ~numbers.isnan() & ~numbers.isposinf()
        if not finite.all():
            text = f"weight '{name}' holds NaN or infinity"
            warnings.warn(text, NaNWeightsWarning, stacklevel=3)


class _Flat(nn.Module):
    """Takes tensors in order and returns a flat tuple, whatever the module takes and returns."""

    PREFIX = "module"

    def __init__(
        self,
        module: nn.Module,
        inputs: tuple[str, ...],
        call: Call,
        names: list[str],
        notes: list[str],
    ) -> None:
        super().__init__()
        self.training = module.training
        self.module = module
        self._inputs, self._call, self._names, self._notes = inputs, call, [names], [notes]

    def forward(self, *values: Tensor) -> tuple[Tensor, ...]:
        result = self._call(self.module, dict(zip(self._inputs, values, strict=True)))
        found, dropped = flatten(result)
        self._names[0][:] = found
        self._notes[0].extend(f"output '{name}' is no tensor and was left out" for name in dropped)
        return tuple(found.values())


@contextlib.contextmanager
def _eval_mode(module: nn.Module) -> Iterator[None]:
    """Puts `module` in eval mode and restores every submodule's own flag afterwards."""
    flags = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in flags:
            part.training = training


def _export(
    flat: _Flat, ready: Dims, notes: list[str]
) -> tuple[torch.export.ExportedProgram, Dims]:
    """Exports with named dimensions, and with fixed sizes when that is all the model allows."""
    try:
        exported = _export_once(flat, ready)
    except RedpassError:
        raise
    except Exception as error:
        _check_forward(flat, ready)
        if not ready.is_dynamic:
            raise _cannot_trace(error) from error
        fixed = ready.fix(ready.names)
        try:
            exported = _export_once(flat, fixed)
        except Exception as second:
            raise _cannot_trace(second) from second
        notes.append(
            f"all sizes are fixed to those of the example: {_first_line(error)}{_user_line(error)}"
        )
        return exported, fixed
    ready, specialised = ready.after(exported)
    notes += specialised
    return exported, ready


def _export_once(flat: _Flat, ready: Dims) -> torch.export.ExportedProgram:
    values = tuple(ready.example.values())
    shapes = (ready.dynamic_shapes(),) if values else None
    log = logging.getLogger("torch._subclasses.fake_tensor")
    before, log.disabled = log.disabled, True  # what fails is told as an error, not at length
    try:
        return torch.export.export(flat.eval(), values, dynamic_shapes=shapes, strict=False)
    finally:
        log.disabled = before


def _check_forward(flat: _Flat, ready: Dims) -> None:
    """Raises `TraceError` with the model's own message when the plain forward fails."""
    try:
        flat(*ready.example.values())
    except RedpassError:
        raise
    except Exception as error:
        raise forward_fails(ready.example, error) from error


def forward_fails(example: Mapping[str, Tensor], error: Exception) -> TraceError:
    """Returns the error for a model that does not run on `example`."""
    shapes = ", ".join(
        f"{name}:{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
        for name, value in example.items()
    )
    return TraceError(
        f"the forward fails on the example inputs ({shapes}): {_first_line(error)}",
        place=_user_line(error).removeprefix(" at ") or None,
        hint="check names, dtypes and shapes of the example inputs, or give others with "
        "--input 'name:dtype[sizes]'",
    )


def _cannot_trace(error: Exception) -> TraceError:
    return TraceError(
        f"the model runs, but cannot be traced to a graph: {_first_line(error)}",
        place=_user_line(error).removeprefix(" at ") or None,
        hint="a graph holds no Python branches on values of tensors: rewrite that line with "
        "torch.where or torch.cond, or pass example inputs that avoid it",
    )


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _user_line(error: BaseException) -> str:
    """Returns ` at file:line` of the innermost frame outside torch and redpass, or ''."""
    place, step = "", error.__traceback__
    while step is not None:
        file = step.tb_frame.f_code.co_filename
        if "/torch/" not in file and "/redpass/" not in file and not file.startswith("<"):
            place = f" at {file}:{step.tb_lineno}"
        step = step.tb_next
    return place


def _random_notes(graph: fx.Graph) -> list[str]:
    found = [node for node in graph.nodes if ops.is_random(node)]
    return [f"'{node.name}' draws random numbers: two runs differ" for node in found]


def _check_state(state: tuple[tuple[str, str], ...], signature: Signature) -> None:
    inputs = {port.name for port in signature.inputs}
    outputs = {port.name for port in signature.outputs}
    for source, result in state:
        if source not in inputs or result not in outputs:
            raise TraceError(f"state pair '{source}' -> '{result}' is not an input and an output")


def weights_digest(weights: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and contents, hex; "" when a weight has no data."""
    total = hashlib.sha256()
    for name in sorted(weights):
        value = weights[name].detach()
        if value.is_meta:
            return ""
        total.update(f"{name}:{value.dtype}:{tuple(value.shape)}".encode())
        flat = value.cpu().contiguous().reshape(-1).view(torch.uint8)
        for part in flat.split(1 << 26):
            total.update(memoryview(part.numpy()))
    return total.hexdigest()
