"""Names of inputs, outputs and dimensions of a `.pt2`: as redpass stored them, or read off it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import sympy
import torch
from torch import SymInt, Tensor
from torch.export import ExportedProgram

from redpass.errors import LoadError
from redpass.frontend.dims import Dims, evaluate
from redpass.program import Port, Signature
from redpass.verify.sizes import Names


def _inputs(exported: ExportedProgram) -> dict[str, Tensor]:
    """Returns the fake values of the user inputs by the name of their node."""
    nodes = {node.name: node for node in exported.graph.nodes if node.op == "placeholder"}
    values = {str(n): nodes[str(n)].meta["val"] for n in exported.graph_signature.user_inputs}
    for name, value in values.items():
        if not isinstance(value, Tensor):
            raise LoadError(f"input '{name}' is no tensor", hint="export with tensors only")
    return values


def stored_dims(exported: ExportedProgram, signature: Signature, file: Path) -> Dims:
    """Returns the dimensions that `signature` names, once it fits the graph.

    Raises:
        LoadError: the graph has other inputs or outputs than the signature says.
    """
    values, results = _inputs(exported), exported.graph_signature.user_outputs
    if (len(values), len(results)) != (len(signature.inputs), len(signature.outputs)):
        raise _misfit(f"{len(values)} inputs and {len(results)} outputs", file)
    names = Names()
    pairs = list(zip(signature.inputs, values.values(), strict=True))
    for port, value in pairs:
        if port.dtype != value.dtype or len(port.shape) != value.dim():
            raise _misfit(f"{value.dtype} of {value.dim()} axes for {port}", file)
        for want, size in zip(port.shape, value.shape, strict=True):
            names.learn(want, size)
    for port, value in pairs:
        if not all(map(names.agree, port.shape, value.shape)):
            raise _misfit(f"{list(map(names.show, value.shape))} for {port}", file)
    sizes = {name: max(low, 2 + i) for i, (name, (low, _)) in enumerate(signature.dims.items())}
    example = {port.name: _example(port, sizes) for port, _ in pairs}
    return Dims(example, {p.name: p.shape for p, _ in pairs}, sizes, dict(signature.dims))


def _misfit(found: str, file: Path) -> LoadError:
    hint = "the file was changed after redpass wrote it: write it again"
    return LoadError(f"the graph has {found}, unlike the signature beside it", file=file, hint=hint)


def _example(port: Port, sizes: dict[str, int]) -> Tensor:
    # Only dtype and shape count, so a large range costs no memory.
    shape = [int(evaluate(size, sizes)) for size in port.shape]
    return torch.zeros((), dtype=port.dtype).expand(shape)


def describe(exported: ExportedProgram) -> tuple[Dims, tuple[str, ...]]:
    """Names the dimensions of an exported program's inputs. Returns them and output names.

    For files that say nothing about names.

    The first axis is `batch`, the second of integer inputs `seq`; other symbols keep a number.
    """
    values = _inputs(exported)
    names = _symbol_names(values)
    axes = {
        name: tuple(_entry(size, names) for size in value.shape) for name, value in values.items()
    }
    ranges = {names[symbol]: _range(exported, symbol) for symbol in names}
    sizes = {name: max(low, 2 + 1 * i) for i, (name, (low, _)) in enumerate(ranges.items())}
    example = {
        name: torch.zeros([int(evaluate(a, sizes)) for a in axes[name]], dtype=value.dtype)
        for name, value in values.items()
    }
    return Dims(example, axes, sizes, ranges), _output_names(exported)


def _symbol_names(values: dict[str, Any]) -> dict[sympy.Symbol, str]:
    names: dict[sympy.Symbol, str] = {}
    for value in values.values():
        for axis, size in enumerate(value.shape):
            if not isinstance(size, SymInt) or not isinstance(size.node.expr, sympy.Symbol):
                continue
            is_index = not value.is_floating_point() and value.dim() == 2
            wish = "batch" if axis == 0 else "seq" if axis == 1 and is_index else f"n{len(names)}"
            taken = wish in names.values()
            names.setdefault(size.node.expr, f"n{len(names)}" if taken else wish)
    for symbol in _symbols(values):  # what occurs in sums only
        names.setdefault(symbol, f"n{len(names)}")
    return names


def _symbols(values: dict[str, Any]) -> list[sympy.Symbol]:
    sizes = [size for value in values.values() for size in value.shape if isinstance(size, SymInt)]
    return sorted({item for size in sizes for item in size.node.expr.free_symbols}, key=str)


def _entry(size: Any, names: dict[sympy.Symbol, str]) -> str | int:
    if isinstance(size, int):
        return size
    renamed = size.node.expr.xreplace({s: sympy.Symbol(n) for s, n in names.items()})
    return int(renamed) if renamed.is_Integer else str(renamed)


def _range(exported: ExportedProgram, symbol: sympy.Symbol) -> tuple[int, int | None]:
    bounds = exported.range_constraints.get(symbol)
    low = int(bounds.lower) if bounds is not None and bounds.lower > 2 else 1
    high = int(bounds.upper) if bounds is not None and bounds.upper < 2**31 else None
    return low, high


def _output_names(exported: ExportedProgram) -> tuple[str, ...]:
    count = len(exported.graph_signature.user_outputs)
    spec: Any = exported.call_spec.out_spec
    if spec is not None and spec.type is dict and len(spec.context) == count:
        return tuple(map(str, spec.context))
    return tuple(f"output_{i}" for i in range(count))
