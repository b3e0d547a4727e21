"""What an op of redpass consists of, and its registration with PyTorch.

An op is a folder: `reference.py` (plain PyTorch, the truth), `kernel.py` (Triton kernels and the
launcher, which need nothing of redpass) and an `Op` record that binds them. The record is all that
tuning, emitting and lowering read.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
"""What kernels take. Float64 is left to the reference: no kernel path of interest runs it."""

Arguments = tuple[Any, ...]


@dataclass(frozen=True)
class Config:
    """How a kernel is cut into blocks.

    Attributes:
        blocks: the kernel's block sizes by their names, and other options of a launch
            (`maxnreg`).
        warps: warps of one program.
        stages: depth of the load pipeline of the main loop.
    """

    blocks: tuple[tuple[str, int], ...]
    warps: int = 4
    stages: int = 1

    @classmethod
    def of(cls, warps: int = 4, stages: int = 1, **blocks: int) -> Config:
        """Returns a config, the block sizes given by name."""
        return cls(tuple(sorted(blocks.items())), warps, stages)

    def options(self) -> dict[str, int]:
        """Returns what a Triton launch takes by keyword."""
        return {**dict(self.blocks), "num_warps": self.warps, "num_stages": self.stages}


@dataclass(frozen=True)
class Op:
    """One `redpass::` op.

    The functions take the op's arguments in the order of the schema, all of them.

    Attributes:
        name: the name after `redpass::`.
        schema: arguments and results as `torch.library` writes them.
        reference: plain PyTorch; runs on every device and dtype, exports to standard ops.
        fake: empty results of the right shape, for tracing.
        launch: `launch(options, *arguments)` runs the kernel; `options` is `Config.options()`.
        refuses: "" or the reason why the kernel does not take these arguments. Cheap: it is
            asked at each call. What holds for all ops (dtype, device) is not its business.
        cpu: what runs on the CPU in place of the reference, where something faster was measured.
        inline: what a graph that runs on the CPU calls by itself in place of the op, where that
            was measured to be faster than the calls of the reference; it may decide by size and
            layout, and its results need not be contiguous.
        constants: tensors that `inline` takes after the op's arguments; they are asked for once,
            with fake values.
        pays: whether the kernel is the better choice here; where it is not, the reference runs
            and nothing is said.
        kind: what the kernel is specialised by: each new kind passes a self-test first.
        probe: small arguments of the same kind, with random contents, on the same device.
        configs: the configs worth trying for these arguments, the default first.
        samples: (label, arguments on the meta device) of typical size for a dtype: what is
            compiled ahead of time.
    """

    name: str
    schema: str
    reference: Callable[..., Any]
    fake: Callable[..., Any]
    launch: Callable[..., Any]
    refuses: Callable[..., str]
    kind: Callable[..., Hashable]
    probe: Callable[..., Arguments]
    configs: Callable[..., tuple[Config, ...]]
    samples: Callable[[torch.dtype], Iterable[tuple[str, Arguments]]]
    cpu: Callable[..., Any] | None = None
    inline: Callable[..., Any] | None = None
    constants: Callable[..., Sequence[Tensor]] = lambda *arguments: ()  # noqa: ARG005
    pays: Callable[..., bool] = lambda *arguments: True  # noqa: ARG005


_TARGET: ContextVar[int] = ContextVar("target", default=80)


@contextlib.contextmanager
def compiling_for(capability: int) -> Iterator[None]:
    """Within it, tensors that are on no GPU count as those of one of this capability (90: 9.0)."""
    token = _TARGET.set(capability)
    try:
        yield
    finally:
        _TARGET.reset(token)


def capability_of(tensor: Tensor) -> int:
    """Returns the compute capability that kernels for a tensor are compiled for; 90 is 9.0.

    The same blocks do not suit all: wgmma reads its operands from shared memory, where the tensor
    cores before compute capability 9.0 need registers for them.
    """
    if tensor.device.type != "cuda":
        return _TARGET.get()
    return _capability(tensor.device)


@functools.cache
def _capability(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def tensors(arguments: Iterable[Any]) -> list[Tensor]:
    """Returns the tensors among an op's arguments."""
    return [argument for argument in arguments if isinstance(argument, Tensor)]


def random_like(tensor: Tensor, *shape: int, scale: float = 1.0) -> Tensor:
    """Returns normal numbers of a tensor's dtype and device, the same at each call."""
    generator = torch.Generator().manual_seed(sum(shape) + len(shape))
    return (scale * torch.randn(shape, generator=generator)).to(tensor.device, tensor.dtype)


PROGRAMS = 256
"""About two for each multiprocessor of a large GPU: enough reads on their way at once."""

SHORTEST_PART = 256
"""Keys that are worth a program of their own."""


def splits_of(programs: int, keys: int) -> int:
    """How many parts the keys of `programs` programs are cut into, a power of two."""
    most = min(-(-PROGRAMS // max(1, programs)), -(-keys // SHORTEST_PART), 64)
    return 1 << max(0, most - 1).bit_length()


_LIBRARY: list[torch.library.Library] = []
"""Holds the library while the process lives: torch forgets the ops when it is collected."""


def register_ops(ops: Mapping[str, Op], on_gpu: Callable[..., Any]) -> None:
    """Registers ops under `redpass::`, once.

    `define`/`impl` rather than `custom_op` or `triton_op`: a third of the overhead of the first
    per call, and the second asks for a GPU driver when it is compiled or checked.

    Args:
        ops: by name.
        on_gpu: `on_gpu(op, *arguments)`, what a call on a GPU does.
    """
    if _LIBRARY:
        return
    library = torch.library.Library("redpass", "FRAGMENT")
    for op in ops.values():
        library.define(op.name + op.schema, tags=(torch.Tag.pt2_compliant_tag,))
        library.impl(op.name, op.cpu or op.reference, "CPU")
        library.impl(op.name, op.reference, "CompositeExplicitAutograd")
        library.impl(op.name, _bound(on_gpu, op), "CUDA")
        library.impl(op.name, op.fake, "Meta")
    _LIBRARY.append(library)


def _bound(on_gpu: Callable[..., Any], op: Op) -> Callable[..., Any]:
    def call(*arguments: Any) -> Any:
        return on_gpu(op, *arguments)

    return call
