"""Times the configurations of kernels, and their rivals, on the GPU that is there.

A configuration counts only when its result is right on the op's probe. The rivals are what would
run without the kernel: the reference in eager PyTorch, and `torch.compile` of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from redpass.codegen import ops as kernels_of
from redpass.codegen.lower import DECODE, PREFILL, find_sites
from redpass.codegen.ops.checking import disagreement
from redpass.codegen.ops.dispatch import launch
from redpass.codegen.ops.op import Arguments, Config, Op
from redpass.codegen.patterns import Site
from redpass.codegen.tuning import Records, Shape, Timing, say_once
from redpass.facts import Facts
from redpass.program import Program

Timer = Callable[[Callable[[], Any]], float]
"""Returns the median time of a call in microseconds."""

SIZES: tuple[Mapping[str, int], ...] = (
    DECODE,
    {"batch": 16, "seq": 1, "past": 4096},
    PREFILL,
    {"batch": 1, "seq": 8192, "past": 0},
)
"""Sizes that a program's places are timed at."""


def device_timer(call: Callable[[], Any]) -> float:
    """Times a call by device events, the cache of the card flushed before each; the median."""
    import triton

    found: Any = triton.testing.do_bench(call, return_mode="median")
    return 1000 * float(found)


def rivals_of(op: Op, arguments: Arguments) -> dict[str, Callable[[], Any]]:
    """Returns what would run without the kernel: the reference, eager and compiled.

    Forgets what was compiled before: PyTorch compiles a function for a handful of shapes only,
    and runs it uncompiled from then on.
    """
    torch.compiler.reset()
    compiled = torch.compile(op.reference, dynamic=False)
    return {
        "eager PyTorch": lambda: op.reference(*arguments),
        "torch.compile": lambda: compiled(*arguments),
    }


def tune(
    op: Op,
    arguments: Arguments,
    timer: Timer = device_timer,
    rivals: Mapping[str, Callable[[], Any]] | None = None,
) -> Timing | None:
    """Returns the fastest right configuration with its time and its best rival's.

    Args:
        arguments: tensors on the GPU.
        timer: how a call is timed.
        rivals: name -> call; `rivals_of` by default.

    Returns:
        None when no configuration is right; the reason is said once.
    """
    micros, faults = dict[Config, float](), list[str]()
    probe = op.probe(*arguments)
    for config in dict.fromkeys(op.configs(*arguments)):
        try:
            if fault := disagreement(op, probe, launch(op, config, *probe)):
                raise ValueError(fault)
            micros[config] = timer(_bound(op, config, arguments))
        except Exception as error:
            faults.append(f"{config.options()}: {_first_line(error)}")
    if not micros:
        say_once(f"redpass::{op.name} has no configuration that works here: {faults[0]}")
        return None
    best = min(micros, key=micros.__getitem__)
    given = rivals_of(op, arguments) if rivals is None else rivals
    others = {name: timer(call) for name, call in given.items()}
    rival = min(others, key=others.__getitem__)
    shape = Shape.of(op, arguments).bucket
    return Timing(shape, best.options(), micros[best], rival, others[rival])


def tune_program(program: Program, timer: Timer = device_timer) -> list[Timing]:
    """Times every distinct place of a program at several sizes, on the current GPU."""
    kernels_of.register()
    found: dict[Shape, Timing] = {}
    for op, arguments in _calls(program):
        shape = Shape.of(op, arguments).bucket
        if shape not in found and op.pays(*arguments) and not op.refuses(*arguments):
            timing = tune(op, tuple(map(materialised, arguments)), timer)
            if timing is not None:
                found[shape] = timing
    return list(found.values())


def _calls(program: Program) -> Iterator[tuple[Op, Arguments]]:
    for site in find_sites(program, Facts(program)):
        if isinstance(site, Site):
            yield from ((kernels_of.OPS[site.op], site.values(program, s)) for s in SIZES)


def materialised(argument: Any, device: str = "cuda") -> Any:
    """Returns random contents for a tensor on the meta device, with its strides."""
    if not isinstance(argument, torch.Tensor):
        return argument
    size, stride, dtype = argument.shape, argument.stride(), argument.dtype
    found = torch.empty_strided(size, stride, dtype=dtype, device=device)
    if dtype is torch.bool:
        return found.fill_(True)
    return found.normal_() if dtype.is_floating_point else found.zero_()


def chooser(records: Records) -> Callable[[Op, Arguments], Config | None]:
    """Returns what picks the tuned configuration for a call; see `ops.use_configs_of`."""
    known: dict[Any, Config | None] = {}

    def choose(op: Op, arguments: Arguments) -> Config | None:
        key = (op.name, *(_layout(argument) for argument in arguments))
        if key not in known:
            known[key] = records.config(Shape.of(op, arguments))
        return known[key]

    return choose


def _layout(argument: Any) -> Any:
    if isinstance(argument, torch.Tensor):
        return argument.dtype, argument.shape
    return tuple(argument) if isinstance(argument, list) else argument


def _bound(op: Op, config: Config, arguments: Arguments) -> Callable[[], Any]:
    return lambda: launch(op, config, *arguments)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
