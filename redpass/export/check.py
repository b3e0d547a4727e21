"""Compares what was written with the program it was written from, on fresh inputs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from redpass.errors import ExportError
from redpass.half_precision import HALVES
from redpass.program import Program
from redpass.verify.inputs import check_inputs
from redpass.verify.numbers import compare_outputs
from redpass.verify.reference import reference

Runner = Callable[[dict[str, Tensor]], Mapping[str, Tensor]]
SEED = 20
"""Other inputs than the passes were checked on."""


@dataclass(frozen=True)
class Report:
    """A written file and how it was checked.

    Attributes:
        verdict: the comparison in words.
        worst: output -> largest error over what was allowed; 1 is the limit.
        notes: what is other in the file than in the program, one sentence each.
    """

    path: Path
    verdict: str
    worst: Mapping[str, float]
    notes: tuple[str, ...] = ()


@contextlib.contextmanager
def whole_or_gone(*paths: Path) -> Iterator[None]:
    """Removes the files when the block fails: none may be taken for a checked one."""
    try:
        yield
    except BaseException:
        for path in paths:
            path.unlink(missing_ok=True)
        raise


def check_outputs(program: Program, run: Runner, path: Path, notes: tuple[str, ...] = ()) -> Report:
    """Runs file and program on fresh inputs of several sizes, some of them padded.

    The error of the file against the float64 run of the program may be twice the program's own
    plus the floor of `redpass.verify.numbers`.

    Raises:
        ExportError: the file does not run, lacks an output, or is further off than allowed; names
            the output, the figures and the sizes.
    """
    worst: dict[str, float] = {}
    for values in check_inputs(program, seed=SEED):
        sizes = "on " + ", ".join(f"{n}{list(v.shape)}" for n, v in list(values.items())[:3])
        truth, plain = _named(program, reference(program, values)), program(**values)
        try:
            found = run(values)
        except Exception as error:
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ExportError(f"does not run {sizes}: {first}", file=path) from error
        new = _ordered(program, found, path)
        verdict = compare_outputs(truth, _named(program, plain), new, sizes)
        if not verdict.passed:
            raise ExportError(
                f"gives other results than the program: {verdict.reason}",
                file=path,
                hint="the file is not to be used; report the model as a fault of redpass",
            )
        for name, ratio in verdict.worst.items():
            worst[name] = max(worst.get(name, 0.0), ratio)
    top = max(worst.values(), default=0.0)
    return Report(path, f"largest share of the tolerance {top:.2f}", worst, notes)


def _named(program: Program, values: Any) -> dict[str, Tensor]:
    return dict(zip([port.name for port in program.signature.outputs], values, strict=True))


def _ordered(program: Program, found: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Returns outputs in the program's order and dtypes; a half may come as float32."""
    result = {}
    for port in program.signature.outputs:
        if port.name not in found:
            raise ExportError("an output is missing", file=path, place=port.name)
        value = found[port.name]
        result[port.name] = value.to(port.dtype) if port.dtype in HALVES else value
    return result
