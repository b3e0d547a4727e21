"""ONNX: a graph of operators that ONNX Runtime runs fast, compared with the program."""

from __future__ import annotations

from pathlib import Path

import onnx
import onnx_ir as ir

from redpass.codegen.decompose import decompose
from redpass.errors import ExportError
from redpass.export.check import Report, check_outputs, whole_or_gone
from redpass.export.generic import translate_generic
from redpass.export.sizes import UntranslatedError
from redpass.export.tidy import tidy
from redpass.export.translate import translate
from redpass.half_precision import HALVES
from redpass.program import Program
from redpass.runtime.onnx import OnnxModel

OPSET = 23
"""The first with Attention, RMSNormalization and RotaryEmbedding."""

OPSETS = (20, 26)
"""The first with Gelu, and the last that ONNX Runtime 1.31 loads."""

EXTERNAL_ABOVE = 1 << 30
"""Bytes of weights above which they go to a file of their own; protobuf ends at 2 GiB."""


def to_onnx(
    program: Program,
    path: str | Path,
    *,
    opset: int = OPSET,
    external_above: int = EXTERNAL_ABOVE,
) -> Report:
    """Writes `program` as ONNX with its public names and dynamic sizes, and compares the two.

    Weights of more than `external_above` bytes go to one file beside it, `<name>.data`. Half
    precision is written as float32, because ONNX Runtime has no kernels for it on the CPU; the
    returned report says so.

    Args:
        path: the file; its folder exists. Written to directly, so give a place inside a folder
            that is renamed when whole.
        opset: version of the standard operators, 20 to 26; attention, RMS norms and rotary
            embeddings are one operator each from 23 on.

    Raises:
        ExportError: an op that ONNX cannot hold, or the file gives other numbers than the program.
    """
    path = Path(path)
    if program.is_fake:
        raise ExportError(
            "the weights carry no data", file=path, hint="load the model without fake=True"
        )
    if not OPSETS[0] <= opset <= OPSETS[1]:
        raise ExportError(
            f"opset {opset} cannot be written",
            file=path,
            hint=f"choose one from {OPSETS[0]} to {OPSETS[1]}",
        )
    model = build(program, opset)
    with whole_or_gone(path, data_file(path)):
        save(model, path, external_above)
        return check_outputs(program, OnnxModel(path), path, _notes(program))


def build(program: Program, opset: int = OPSET) -> ir.Model:
    """Returns the ONNX model of a program; its weights are read when it is saved.

    `redpass::` ops become the standard operators of their references, fused as any others are, so
    ONNX Runtime needs no library of ours.

    Raises:
        ExportError: an op that ONNX cannot hold.
    """
    program = decompose(program)
    try:
        model = translate(program, opset)
    except UntranslatedError as reason:
        model = translate_generic(program, opset, str(reason))
    tidy(model, program)
    _check_ports(program, model)
    return model


def save(model: ir.Model, path: Path, external_above: int = EXTERNAL_ABOVE) -> None:
    """Writes a model, with its weights beside it when they are large. Checks its form."""
    tensors = [value.const_value for value in model.graph.initializers.values()]
    total = sum(tensor.nbytes for tensor in tensors if tensor is not None)
    name = data_file(path).name if total > external_above else None
    ir.save(model, path, external_data=name)
    try:
        onnx.checker.check_model(str(path))
    except onnx.checker.ValidationError as error:
        first = str(error).strip().splitlines()[0]
        raise ExportError(f"the ONNX checker refuses it: {first}", file=path) from error


def data_file(path: Path) -> Path:
    """Returns where the weights of the file at `path` lie when they are not in it."""
    return path.with_name(f"{path.name}.data")


def _check_ports(program: Program, model: ir.Model) -> None:
    for kind in ("inputs", "outputs"):
        wanted = [port.name for port in getattr(program.signature, kind)]
        found = [value.name for value in getattr(model.graph, kind)]
        if wanted != found:
            raise ExportError(f"{kind} became {', '.join(map(str, found))}", place=str(wanted))


def _notes(program: Program) -> tuple[str, ...]:
    tensors = list(program.weights.values())
    dtypes = {t.dtype for t in tensors} | {port.dtype for port in program.signature.inputs}
    halves = [str(dtype).removeprefix("torch.") for dtype in HALVES if dtype in dtypes]
    if not halves:
        return ()
    return (f"{' and '.join(halves)} written as float32: ONNX Runtime's CPU kernels need it",)
