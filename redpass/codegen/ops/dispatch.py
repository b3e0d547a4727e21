"""Decides at each call on a GPU between the kernel and the reference.

The kernel runs when this device, dtype and shape are its own and its self-test held. Everything
else runs the reference, and the reason is said once as a `KernelWarning`.
"""

from __future__ import annotations

import functools
import importlib.util
import warnings
from collections.abc import Callable, Hashable
from typing import Any

import torch

from redpass.codegen.ops.checking import disagreement
from redpass.codegen.ops.op import DTYPES, Config, Op, tensors
from redpass.config import from_environment

LEAST_CAPABILITY = (8, 0)
"""Oldest CUDA compute capability for which the kernels are compiled and checked."""


class KernelWarning(UserWarning):
    """A kernel did not run; its reference did, and the result is right."""


Chooser = Callable[[Op, tuple[Any, ...]], Config | None]
"""Gives the tuned config for a call, or None where the default is to be taken."""

_chooser: list[Chooser] = []
_verdicts: dict[Hashable, str] = {}
_said: set[tuple[str, str]] = set()


def use_configs_of(chooser: Chooser | None) -> None:
    """Lets `chooser` pick configs from now on; None goes back to the defaults."""
    _chooser[:] = [] if chooser is None else [chooser]


def forget() -> None:
    """Forgets verdicts and what was said, as in a fresh process."""
    _verdicts.clear()
    _said.clear()
    mode.cache_clear()
    has_triton.cache_clear()
    device_fault.cache_clear()


def run(op: Op, *arguments: Any) -> Any:
    """Runs the kernel of an op where it may run, its reference otherwise."""
    if not op.pays(*arguments):
        return op.reference(*arguments)
    reason = why_not(op, arguments)
    if not reason:
        config = _chooser[0](op, arguments) if _chooser else None
        try:
            return launch(op, config or op.configs(*arguments)[0], *arguments)
        except Exception as error:
            reason = _failure(error)
            _verdicts[_key(op, arguments)] = reason
    if reason != "asked for":
        _say(op, reason)
    return op.reference(*arguments)


def launch(op: Op, config: Config, *arguments: Any) -> Any:
    """Runs the kernel of an op, unconditionally."""
    return op.launch(config.options(), *arguments)


def why_not(op: Op, arguments: tuple[Any, ...]) -> str:
    """Returns "" or the reason why the kernel does not run for these arguments."""
    if mode() == "reference":
        return "asked for"
    operands = tensors(arguments)
    dtype, device = operands[0].dtype, operands[0].device
    if not has_triton():
        return "triton is not installed"
    if dtype not in DTYPES:
        return f"no kernel for {str(dtype).removeprefix('torch.')}"
    if any(operand.device != device for operand in operands):
        return "the operands are on several devices"
    return device_fault(device) or op.refuses(*arguments) or _verdict(op, arguments)


@functools.cache
def mode() -> str:
    """Returns `REDPASS_KERNELS`: `auto`, `triton` or `reference`."""
    return from_environment().kernels


@functools.cache
def has_triton() -> bool:
    """Whether Triton is installed. It is imported at the first launch, not before."""
    return importlib.util.find_spec("triton") is not None


@functools.cache
def device_fault(device: torch.device) -> str:
    """Returns "" or why no kernel runs on a device."""
    if device.type != "cuda":
        return f"no kernels for the device '{device.type}'"
    capability = torch.cuda.get_device_capability(device)
    if capability < LEAST_CAPABILITY:
        return "compute capability {}.{} is below {}.{}".format(*capability, *LEAST_CAPABILITY)
    return ""


def _verdict(op: Op, arguments: tuple[Any, ...]) -> str:
    """The self-test's finding for this kind of call, testing it when it is new."""
    key = _key(op, arguments)
    if key not in _verdicts:
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            return "its self-test cannot run while a CUDA graph is captured: call it once before"
        _verdicts[key] = self_test(op, arguments)
    return _verdicts[key]


def _key(op: Op, arguments: tuple[Any, ...]) -> Hashable:
    return op.name, tensors(arguments)[0].device, op.kind(*arguments)


def self_test(op: Op, arguments: tuple[Any, ...]) -> str:
    """Compares kernel and reference on small arguments of the same kind.

    Returns:
        "" when they agree, else what is wrong.
    """
    probe = op.probe(*arguments)
    try:
        found = launch(op, op.configs(*probe)[0], *probe)
        return disagreement(op, probe, found)
    except Exception as error:
        return _failure(error)


def _failure(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"its kernel failed: {type(error).__name__}: {lines[0] if lines else ''}".rstrip(": ")


def _say(op: Op, reason: str) -> None:
    if (op.name, reason) not in _said:
        _said.add((op.name, reason))
        text = f"redpass::{op.name} runs its reference in PyTorch: {reason}"
        warnings.warn(text, KernelWarning, stacklevel=3)
