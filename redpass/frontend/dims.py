"""Names of dimensions: which axes of the example inputs are symbolic, and what they are called."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from keyword import iskeyword
from typing import Any

import sympy
import torch
from torch import Tensor

from redpass.errors import UsageError

DimNames = Mapping[str, Sequence[str | int]]
"""Input name -> a name, an expression over names, or a size for each axis."""

_WORD = re.compile(r"[A-Za-z_]\w*")
_LEAST = re.compile(r"Min\((\d+), ([^(),]+)\)")
_EXPRESSION = re.compile(r"[A-Za-z_]\w*(\s*[+*]\s*([A-Za-z_]\w*|\d+))*|\d+(\s*\*\s*[A-Za-z_]\w*)+")


@dataclass(frozen=True)
class Dims:
    """Example inputs whose named axes are at least 2 long, so that no size hides a special case.

    Attributes:
        example: input name -> tensor.
        axes: input name -> one entry an axis: a size, or an expression over dimension names.
        sizes: dimension name -> its size in the example.
        ranges: dimension name -> (smallest, largest or None).
    """

    example: Mapping[str, Tensor]
    axes: Mapping[str, tuple[str | int, ...]]
    sizes: Mapping[str, int]
    ranges: Mapping[str, tuple[int, int | None]]

    @property
    def names(self) -> tuple[str, ...]:
        """The dimension names."""
        return tuple(self.sizes)

    @property
    def is_dynamic(self) -> bool:
        """Whether any axis is symbolic."""
        return bool(self.sizes)

    def dynamic_shapes(self) -> tuple[dict[int, Any], ...]:
        """Returns `torch.export`'s form: every named axis may vary, and may turn out fixed."""
        auto = torch.export.Dim.AUTO
        return tuple(
            {axis: auto for axis, size in enumerate(self.axes[name]) if isinstance(size, str)}
            for name in self.example
        )

    def fix(self, names: Iterable[str]) -> Dims:
        """Returns the same with the dimensions `names` fixed to their size in the example."""
        fixed = {name: self.sizes[name] for name in names if name in self.sizes}
        left = {name: size for name, size in self.sizes.items() if name not in fixed}
        axes = {
            name: tuple(_substitute(axis, fixed) for axis in entries)
            for name, entries in self.axes.items()
        }
        return replace(
            self, axes=axes, sizes=left, ranges={k: v for k, v in self.ranges.items() if k in left}
        )

    def after(self, exported: torch.export.ExportedProgram) -> tuple[Dims, list[str]]:
        """Returns the dimensions that survived the export, and a note for each that did not."""
        values = _placeholder_values(exported, len(self.example))
        lost: dict[str, Any] = {}
        ranges = dict(self.ranges)
        for entries, value in zip(self.axes.values(), values, strict=True):
            for axis, entry in enumerate(entries):
                if not isinstance(entry, str) or entry not in self.sizes:
                    continue
                size = value.shape[axis]
                if is_fixed(size):
                    lost.setdefault(entry, size)
                else:
                    ranges[entry] = _narrow(ranges[entry], exported, size)
        notes = [
            f"dimension '{dim}' is fixed to {self.sizes[dim]}{_why(size)}"
            for dim, size in lost.items()
        ]
        notes += _assumptions(values)
        return replace(self, ranges=ranges).fix(lost), notes


def prepare(
    example: Mapping[str, Tensor], dims: DimNames, ranges: Mapping[str, tuple[int, int | None]]
) -> Dims:
    """Checks `dims` against the example and lengthens named axes of size 0 and 1 to 2.

    A name that cannot be a symbol's (of u or z at the start) gets `n_` before it.

    Raises:
        UsageError: an unknown input, another rank, a bad expression, or one name for two sizes.
    """
    axes: dict[str, tuple[str | int, ...]] = {}
    for name in dims:
        if name not in example:
            raise UsageError(f"no such input; there are {', '.join(example)}", place=name)
    for name, value in example.items():
        entries = tuple(dims.get(name, tuple(value.shape)))
        _check_entries(name, entries, value)
        axes[name] = tuple(e if isinstance(e, int) else _WORD.sub(_symbol, e) for e in entries)
    ranges = {_WORD.sub(_symbol, name): limits for name, limits in ranges.items()}
    longer = dict(example)
    for name, entries in axes.items():
        for axis, entry in enumerate(entries):
            if isinstance(entry, str) and longer[name].shape[axis] < 2:
                longer[name] = _lengthen(longer[name], axis)
    sizes = _sizes(longer, axes)
    longer = {name: _resize(value, axes[name], sizes) for name, value in longer.items()}
    return Dims(longer, axes, sizes, {name: ranges.get(name, (1, None)) for name in sizes})


def _symbol(word: re.Match[str]) -> str:
    # torch reads the kind of a symbol off its first letters: u and z are not plain sizes.
    return f"n_{word[0]}" if word[0][0] in "uzUZ" else word[0]


def is_fixed(size: Any) -> bool:
    """Whether a size is a number, or a symbol that was found to have one value only."""
    return isinstance(size, int) or bool(size.node.expr.is_number)


def evaluate(entry: str | int, sizes: Mapping[str, Any]) -> Any:
    """Returns the value of a size expression, with `sizes` for its names (ints or SymInts).

    Expressions are sums of products, and `Min(32, past)` of a number and one of them.

    Raises:
        UsageError: a name without a size.
    """
    if isinstance(entry, int):
        return entry
    if least := _LEAST.fullmatch(entry):
        most, size = int(least[1]), evaluate(least[2], sizes)
        return sympy.Min(most, size) if isinstance(size, sympy.Expr) else torch.sym_min(most, size)
    total: Any = 0
    for term in entry.split("+"):
        product: Any = 1
        for factor in term.split("*"):
            word = factor.strip()
            if not word.isdigit() and word not in sizes:
                raise UsageError(f"no size for dimension '{word}'", place=entry)
            product = product * (int(word) if word.isdigit() else sizes[word])
        total = total + product
    return total


def _check_entries(name: str, entries: tuple[str | int, ...], value: Tensor) -> None:
    if len(entries) != value.dim():
        raise UsageError(
            f"{len(entries)} axes are named, the example has {value.dim()}: {list(value.shape)}",
            place=f"input '{name}'",
        )
    for entry, size in zip(entries, value.shape, strict=True):
        if isinstance(entry, str):
            if not _EXPRESSION.fullmatch(entry) or any(map(iskeyword, _WORD.findall(entry))):
                hint = "a name is made of letters, digits and '_', and no word of Python's"
                place = f"input '{name}'"
                raise UsageError(f"'{entry}' is no dimension name", place=place, hint=hint)
        elif entry != size:
            raise UsageError(f"size {size}, expected {entry}", place=f"input '{name}'")


def _sizes(
    values: Mapping[str, Tensor], axes: Mapping[str, tuple[str | int, ...]]
) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for name, entries in axes.items():
        for entry, size in zip(entries, values[name].shape, strict=True):
            if isinstance(entry, str) and _WORD.fullmatch(entry):
                sizes[entry] = max(size, sizes.get(entry, 0))
    return sizes


def _lengthen(value: Tensor, axis: int) -> Tensor:
    if value.shape[axis] == 1:
        return torch.cat([value, value], axis)
    shape = list(value.shape)
    shape[axis] = 2
    return value.new_zeros(shape)


def _resize(value: Tensor, entries: tuple[str | int, ...], sizes: Mapping[str, int]) -> Tensor:
    """Cuts or repeats `value` so that expressions such as `past + seq` hold in the example."""
    for axis, entry in enumerate(entries):
        want = evaluate(entry, sizes)
        have = value.shape[axis]
        if have == want:
            continue
        if isinstance(entry, str) and _WORD.fullmatch(entry):
            raise UsageError(
                f"dimension '{entry}' is {have} here and {want} in another input",
                hint="give example inputs whose sizes agree",
            )
        copies = -(-want // max(have, 1))
        value = torch.cat([value] * copies, axis).narrow(axis, 0, want)
    return value


def _substitute(axis: str | int, fixed: Mapping[str, int]) -> str | int:
    if isinstance(axis, int):
        return axis
    known: dict[str, Any] = {
        word: fixed.get(word, sympy.Symbol(word)) for word in _WORD.findall(axis)
    }
    result = evaluate(axis, known)
    return int(result) if getattr(result, "is_Integer", isinstance(result, int)) else str(result)


def _placeholder_values(exported: torch.export.ExportedProgram, count: int) -> list[Any]:
    names = exported.graph_signature.user_inputs
    nodes = {node.name: node for node in exported.graph.nodes if node.op == "placeholder"}
    return [nodes[str(name)].meta["val"] for name in names[:count]]


def _narrow(
    known: tuple[int, int | None], exported: torch.export.ExportedProgram, size: torch.SymInt
) -> tuple[int, int | None]:
    bounds = exported.range_constraints.get(size.node.expr)
    if bounds is None:
        return known
    low, high = known
    # 2 is what torch assumes for every size, and says nothing about the model.
    if int(bounds.lower) > 2:
        low = max(low, int(bounds.lower))
    if bounds.upper.is_finite and bounds.upper < 2**31:
        high = int(bounds.upper) if high is None else min(high, int(bounds.upper))
    return low, high


def _assumptions(values: Iterable[Any]) -> list[str]:
    """Returns a note for each condition on sizes that the trace took for granted.

    Bounds on one size are in the ranges already; what is left are conditions such as
    `Mod(seq, 8) == 0`, which a branch in the model's code asked for.
    """
    environment = _environment(values)
    notes = []
    for guard in getattr(environment, "guards", ()):
        expression = guard.expr.xreplace(environment.replacements)
        words = sorted(map(str, expression.free_symbols))
        if words and (expression.atoms(sympy.Mod) or "Mod(" in str(expression)):
            notes.append(f"traced for sizes with {expression}{_at(guard.sloc)}")
    return notes


def _environment(values: Iterable[Any]) -> Any:
    for value in values:
        for size in value.shape:
            if isinstance(size, torch.SymInt):
                return size.node.shape_env
    return None


def _why(size: Any) -> str:
    """Returns ` at file:line` of the user code that gave a symbolic size its one value."""
    if isinstance(size, int):
        return ""
    places = getattr(size.node.shape_env, "replacements_slocs", {})
    return _at(places.get(size.node._expr))


def _at(place: Any) -> str:
    frame = getattr(place, "maybe_user_loc", None) or getattr(place, "framework_loc", None)
    if frame is None or not hasattr(frame, "filename") or "/torch/" in frame.filename:
        return ""
    return f" at {frame.filename}:{frame.lineno}"
