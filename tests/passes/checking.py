"""Checks that any pass must stand: same bits, fixpoint, input untouched, golden text."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from redpass import rewrite
from redpass.data import Batches
from redpass.facts import Facts
from redpass.plan import Action, Exactness, Pass, Plan
from redpass.program import Program
from redpass.verify.rules import check_rules

GOLDEN = Path(__file__).parent / "golden"

Inputs = Mapping[str, Tensor] | Sequence[Tensor]


@dataclass(frozen=True)
class Checked:
    """What `check_pass` made: the plan and the program after it."""

    plan: Plan
    after: Program

    @property
    def rules(self) -> list[str]:
        """The rule of each action, in order."""
        return [action.rule for action in self.plan.actions]


def plan_pass(pass_: Pass, program: Program, data: Batches | None = None) -> Plan:
    """Plans with facts restricted to what the pass declared."""
    return pass_.plan(program, Facts(program, data).restrict(tuple(pass_.needs)))


def applied(program: Program, *actions: Action) -> Program:
    """Does some actions and checks the graph's rules."""
    after = rewrite.apply(program, actions)
    check_rules(after)
    return after


def run_pass(pass_: Pass, program: Program) -> Checked:
    """Plans and applies, and checks everything that needs no inputs."""
    digest, weights = program.digest, dict(program.weights)
    versions = {name: tensor._version for name, tensor in weights.items()}
    plan = plan_pass(pass_, program)
    after = rewrite.apply(program, plan.actions)
    assert program.digest == digest, "the pass changed the program it was given"
    assert all(program.weights[name] is weights[name] for name in weights)
    assert all(weights[name]._version == versions[name] for name in weights), "a weight changed"
    assert len({action.key for action in plan.actions}) == len(plan.actions), "keys repeat"
    again = plan_pass(pass_, after)
    assert not again.actions, f"a second run plans {[action.key for action in again.actions]}"
    after.graph.lint()
    check_rules(after)
    return Checked(plan, after)


def drawn(program: Program, sizes: Mapping[str, int]) -> dict[str, Tensor]:
    """Random inputs of the named sizes; masks let most through."""
    generator = torch.Generator().manual_seed(0)
    found = {}
    for port in program.signature.inputs:
        shape = [sizes[s] if isinstance(s, str) else s for s in port.shape]
        value = torch.randn(shape, generator=generator)
        found[port.name] = value > -0.5 if port.dtype is torch.bool else value
    return found


def run(program: Program, inputs: Inputs) -> tuple[Tensor, ...]:
    """Runs a program on inputs given by name or in order."""
    return program(**inputs) if isinstance(inputs, Mapping) else program(*inputs)


def is_same_bits(left: Tensor, right: Tensor) -> bool:
    """Whether two tensors have the same dtype, shape and bits; any NaN counts as the same NaN."""
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    if not left.is_floating_point():
        return torch.equal(left, right)
    nan = left.isnan()
    same = (left == right) & (left.signbit() == right.signbit())
    return bool((same | (nan & right.isnan())).all())


def check_numbers(exactness: Exactness, before: Program, after: Program, inputs: Inputs) -> None:
    """Runs both programs and compares the outputs as `exactness` promises."""
    old, new = run(before, inputs), run(after, inputs)
    assert len(old) == len(new)
    if exactness is Exactness.SAME_BITS:
        for port, left, right in zip(before.signature.outputs, old, new, strict=True):
            assert is_same_bits(left, right), f"{port.name}: {left} became {right}"
        return
    from redpass.verify.numbers import compare

    named = dict(zip([p.name for p in before.signature.inputs], inputs, strict=True))
    values = inputs if isinstance(inputs, Mapping) else named
    verdict = compare(before, after, [values], exactness=exactness)
    assert verdict.passed, verdict.reason


def describe(program: Program, checked: Checked) -> str:
    """Returns what golden files hold: the text before, the plan, the text after."""
    lines = [f"action {a.key}: {a.reason}" for a in checked.plan.actions]
    lines += [f"skip {s.rule}:{s.target}: {s.reason}" for s in checked.plan.skips]
    parts = ["# before", program.text, "# plan", *lines, "# after", checked.after.text]
    return _plain_symbols("\n".join(parts)) + "\n"


def _plain_symbols(text: str) -> str:
    """Numbers symbols as they occur: torch versions name them differently."""
    order: dict[str, str] = {}
    return re.sub(r"\bs\d+\b", lambda m: order.setdefault(m[0], f"s{len(order)}"), text)


def check_golden(name: str, text: str, update: bool, folder: Path = GOLDEN) -> None:
    """Compares `text` with the golden file `name`, or writes it. A missing file fails."""
    path = folder / f"{name}.txt"
    if update:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert path.exists(), f"{path} is missing; look at the result, then run with --update-golden"
    assert text == path.read_text(), f"{path.name} differs; if it should, run with --update-golden"
