"""Writes an activation that was traced op by op as the one op it is.

a = x * 0.5
t = tanh(0.79788 * (x + 0.044715 * x ** 3))        ->    y = gelu(x, approximate="tanh")
y = a * (1 + t)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from redpass.analysis.unary_functions import UnaryFunction, unary_functions
from redpass.facts import Facts
from redpass.plan import Action, Exactness, Insert, Plan, Ref, Replace, Skip
from redpass.program import Program

aten = torch.ops.aten

PROBES = torch.cat([torch.linspace(-12, 12, 241), torch.linspace(-1, 1, 64)]).double()
SAME, NEAR = 1e-11, 1e-3
"""Largest differences at the probes that count as the same function and as meant to be it."""


@dataclass(frozen=True)
class _Known:
    rule: str
    target: Callable[..., Any]
    kwargs: tuple[tuple[str, str], ...] = ()

    def __call__(self, x: Tensor) -> Tensor:
        result: Tensor = self.target(x, **dict(self.kwargs))
        return result


KNOWN = (
    _Known("fuse_activations.gelu_tanh", aten.gelu.default, (("approximate", "tanh"),)),
    _Known("fuse_activations.gelu", aten.gelu.default),
    _Known("fuse_activations.silu", aten.silu.default),
)


@dataclass(frozen=True)
class FuseActivations:
    """Replaces written-out GELU (both kinds) and SiLU by the op.

    What: elementwise ops that turn one value into another with literals alone. What function they
    are is told by its value in float64 at 305 points: any spelling is found.
    When: the difference is at most 1e-11 everywhere. A rounded constant (0.79788456 for the square
    root of 2/pi) is another function, and is left with that reason.
    Not tried: activations that no ATen op has.
    Costs: some hundred values per candidate. Time after / before of GELU (tanh), 3072 channels, at
    1, 16 and 128 tokens, one core: eager 0.25, 0.54, 0.63; `torch.compile` 0.64, 0.69, 0.77; ONNX
    Runtime 0.40, 0.34, 0.32 (it leaves the seven ops as they are).
    Source: Hendrycks and Gimpel 2016, arXiv:1606.08415.
    """

    name: ClassVar[str] = "fuse_activations"
    needs: ClassVar[tuple[Any, ...]] = (unary_functions,)
    exactness: ClassVar[Exactness] = Exactness.WITHIN_TOLERANCE

    def plan(self, program: Program, facts: Facts) -> Plan:
        """Plans one action per activation."""
        return Plan.of(_judge_all(facts.get(unary_functions)))


def _judge_all(functions: tuple[UnaryFunction, ...]) -> Iterator[Action | Skip]:
    for function in functions:
        value = function(PROBES)
        errors = {known: float((value - known(PROBES)).abs().max()) for known in KNOWN}
        known, error = min(errors.items(), key=lambda item: item[1])
        if error <= SAME:
            yield _fuse(function, known)
        elif error <= NEAR:
            reason = f"its constants are rounded: it is off by {error:.0e}"
            yield Skip(known.rule, function.result.name, reason)


def _fuse(function: UnaryFunction, known: _Known) -> Action:
    old, name = function.result.name, f"{function.result.name}_fused"
    source: fx.Node = function.source
    call = Insert(name, known.target, (Ref(source.name),), old, dict(known.kwargs))
    return Action(
        known.rule,
        old,
        (call, Replace(old, name)),
        f"{len(function.nodes)} elementwise ops compute {known.rule.partition('.')[2]}",
        {"nodes": len(function.nodes)},
    )
