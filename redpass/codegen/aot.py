"""Compiles kernels for GPUs that this machine does not have, and says what they would use.

`triton.compile` needs no device when the target is named; `cuobjdump`, which ships with Triton,
reads registers, stack and shared memory off the result. A kernel that spills, or asks for more
shared memory than the card has, is known before any time on a card is spent.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from redpass.codegen.ops.dispatch import has_triton
from redpass.codegen.ops.op import Arguments, Config, Op, compiling_for
from redpass.codegen.ops.recorded import Launch, recorded, recording
from redpass.errors import ExportError, UsageError, nearest

TARGETS: Mapping[str, int] = {"sm_80": 80, "sm_86": 86, "sm_89": 89, "sm_90": 90}
"""Name of an architecture -> its compute capability."""

SHARED_LIMIT: Mapping[str, int] = {
    "sm_80": 163 * 1024,
    "sm_86": 99 * 1024,
    "sm_89": 99 * 1024,
    "sm_90": 227 * 1024,
}
"""Bytes of shared memory one block may use (CUDA C++ Programming Guide, compute capabilities)."""

_USAGE = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")


@dataclass(frozen=True)
class AotReport:
    """What one kernel compiled for one architecture uses.

    Attributes:
        kernel: name of the kernel function.
        target: architecture, such as `sm_90`.
        registers: registers a thread.
        spills: bytes a thread keeps on the stack because registers did not suffice.
        shared: bytes of shared memory a block.
        ptx: the assembly text.
        cubin: the machine code.
    """

    kernel: str
    target: str
    registers: int
    spills: int
    shared: int
    ptx: str
    cubin: bytes

    @property
    def fits(self) -> bool:
        """Whether it runs on that architecture without spilling."""
        return not self.spills and self.shared <= SHARED_LIMIT[self.target]


def check_targets(text: str) -> tuple[str, ...]:
    """Returns the architectures named in `sm_80,sm_90`. Raises `UsageError` for an unknown one."""
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    for name in names:
        if name not in TARGETS:
            hint = nearest(name, TARGETS)
            raise UsageError(f"unknown architecture '{name}'", place="--aot", hint=hint)
    return names


def build(
    op: Op, arguments: Arguments, target: str, cache: Path, config: Config | None = None
) -> tuple[AotReport, ...]:
    """Compiles every kernel that one call of `op` launches; a GPU is not needed.

    Args:
        arguments: what the call is given, on the meta device; see `Op.samples`.
        target: a name in `TARGETS`.
        cache: folder for the compiler's cache; nothing is written anywhere else.
        config: the op's default for these arguments when not given.

    Raises:
        ExportError: Triton is missing, interprets, or refuses a kernel.
    """
    _check_compiler(op.name)
    with compiling_for(TARGETS[target]):
        launches = recorded(op, config or op.configs(*arguments)[0], *arguments)
    return tuple(compile_launch(launch, target, cache) for launch in launches)


def build_file(
    path: Path, samples: Mapping[str, tuple[Any, ...]], target: str, cache: Path
) -> dict[str, tuple[AotReport, ...]]:
    """Compiles every kernel that an emitted file launches for `samples`.

    Args:
        samples: label -> what its `run` is given, on the meta device.

    Returns:
        Label -> reports, in the order of the launches.

    Raises:
        ExportError: as `build` does.
    """
    module = _imported(path)
    module.CAPABILITY = TARGETS[target]
    found = {}
    for label, arguments in samples.items():
        with recording() as launches:
            module.run(*arguments)
        found[label] = tuple(compile_launch(launch, target, cache) for launch in launches)
    return found


def _check_compiler(place: str) -> None:
    """Raises where Triton is missing, or makes kernels for its interpreter."""
    if not has_triton():
        raise ExportError("triton is not installed", place=place, hint="pip install triton")
    from triton import knobs

    if knobs.runtime.interpret:
        hint = "unset TRITON_INTERPRET"
        raise ExportError("interpreted kernels cannot be compiled", place=place, hint=hint)


def _imported(path: Path) -> Any:
    _check_compiler(path.stem)
    spec = importlib.util.spec_from_file_location(f"redpass_emitted_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Nothing is left beside the file: its folder is checked as it was written.
    before, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try:
        spec.loader.exec_module(module)
    finally:
        sys.dont_write_bytecode = before
    return module


def compile_launch(launch: Launch, target: str, cache: Path) -> AotReport:
    """Compiles the kernel of one launch. Raises as `build` does."""
    import triton
    from triton.backends.compiler import GPUTarget

    # Said outright, because its default is about to change.
    options = {**launch.options, "enable_fp_fusion": True}
    try:
        with _cached_in(cache):
            compiled = triton.compile(
                launch.source(), target=GPUTarget("cuda", TARGETS[target], 32), options=options
            )
    except Exception as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ExportError(f"does not compile for {target}: {first}", place=launch.name) from error
    code = compiled.asm["cubin"]
    registers, stack, static, local = _usage(code, cache)
    shared = max(static, int(compiled.metadata.shared))
    return AotReport(
        launch.name, target, registers, stack + local, shared, compiled.asm["ptx"], code
    )


@contextlib.contextmanager
def _cached_in(folder: Path) -> Iterator[None]:
    """Points Triton's cache at `folder`, and back."""
    from triton import knobs

    folder.mkdir(parents=True, exist_ok=True)
    with knobs.cache.scope():
        knobs.cache.dir = str(folder)
        yield


def _usage(code: bytes, cache: Path) -> tuple[int, int, int, int]:
    """Registers, stack, static shared memory and local memory of a cubin."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    number, name = tempfile.mkstemp(suffix=".cubin", dir=cache)
    try:
        with os.fdopen(number, "wb") as file:
            file.write(code)
        done = subprocess.run(
            [tool, "-res-usage", name], capture_output=True, text=True, check=False
        )
    except OSError as error:
        raise ExportError(f"cuobjdump does not run: {error.strerror}", file=tool) from error
    finally:
        os.unlink(name)
    found = _USAGE.search(done.stdout)
    if found is None:
        raise ExportError("cuobjdump says nothing of registers", file=tool, hint=done.stderr[:200])
    registers, stack, shared, local = map(int, found.groups())
    return registers, stack, shared, local
