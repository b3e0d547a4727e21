"""The way for programs with an op that has no translation here: torch's own ONNX exporter."""

from __future__ import annotations

import contextlib
import io
import logging
import re
import warnings
from collections.abc import Iterator

import onnx_ir as ir
import torch
from onnx_ir.passes import common

from redpass.errors import ExportError, clean
from redpass.export.pt2 import exported_program
from redpass.program import Program

LONGEST = 160
"""Characters of what torch's exporter says; `--debug` shows all of it."""


def translate_generic(program: Program, opset: int, reason: str) -> ir.Model:
    """Returns the ONNX model torch's exporter makes of `program`, under its public names.

    Args:
        reason: why redpass did not translate it itself.

    Raises:
        ExportError: torch's exporter cannot do it either; names both reasons.
    """
    inputs = [port.name for port in program.signature.inputs]
    outputs = [port.name for port in program.signature.outputs]
    try:
        with _quiet():
            found = torch.onnx.export(
                exported_program(program),
                input_names=inputs,
                output_names=outputs,
                opset_version=opset,
                dynamo=True,
                verbose=False,
            )
        assert found is not None
        model = found.model
    except Exception as error:
        raise ExportError(
            f"no ONNX form: {reason}; torch.onnx.export: {_root(error)}",
            hint="write a .pt2, which holds every op",
        ) from error
    common.InlinePass()(model)
    return model


def _root(error: BaseException) -> str:
    """Returns the first line of what began it, cut, without the colours of a terminal."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip()
    return clean((text.splitlines() or [type(error).__name__])[0], LONGEST)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
