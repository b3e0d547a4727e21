"""Compares two programs on inputs: is the second as right as the first, by its own dtype's measure?

The rule, for each output port of each set of inputs, with `ref` the float64 run of `before`:

    error(x)    = ||x - ref|| / ||ref||           over the whole tensor
    row error   = the largest of the same figure over rows (all but the last axis)
    error(after) <= 2 * error(before) + floor     and likewise for rows

*Why twice.* A result that went through k roundings of relative size u = eps / 2 is off by about
u * sqrt(k), times what later operations make of it; `before` measures that product. A rewrite that
reorders arithmetic may add as many roundings as there were (weights folded and rounded again), so
u * sqrt(2 k): below twice.

*Why a floor, and why 4 eps.* `before` can be right by luck: one correctly rounded operation on
exact inputs, or none at all, has an error of 0 to u, and twice nothing is nothing. What a rewrite
of so little arithmetic can add is a few roundings: a folded weight (u), its product (u), the sum
it goes into (u), a second fold (u), at worst all with one sign, 4 u = 2 eps. The floor allows twice
that. A row of n numbers averages its errors and stays below; a row of one cannot, and a sum that
cancels makes much of each rounding. So a result of under 256 numbers may be off by twice as much,
and a row of under 8 numbers by four times.

*What float64 sees.* `after` is run in float64 too, where its activations are not rounded. What is
left are the weights it folded: each was rounded once or twice (2 u = eps), and what becomes of
that is at most what became of the roundings of `before`, so 2 * error(before) + eps. When `after`
reads no weight that `before` does not, nothing was folded, and the two must agree almost to
float64's own rounding: (2 * error(before) + floor) shrunk by the ratio of the two eps, with
`SLACK` for programs whose sums run wider than their dtype. That tells a dropped bias from noise in
bfloat16. A folded weight wrong by a few eps of its dtype cannot be told from a rounded one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from redpass.errors import VerifyError
from redpass.plan import Exactness
from redpass.program import Program
from redpass.verify.differences import (
    differing_bits,
    lost_finite,
    misplaced_nonfinite,
    relative_errors,
    shape_fault,
)
from redpass.verify.reference import reference

SLACK = 1e4
Outputs = Mapping[str, Tensor]


@dataclass(frozen=True)
class Verdict:
    """What a comparison found.

    Attributes:
        state: `proved` (equal without running), `checked` (held on the inputs), `failed`, or
            `not checked` (nothing could be run; says nothing about the result).
        reason: in words, naming the output port and the figures that decided.
        worst: output port -> largest error over what was allowed, 1 is the limit.
        errors: output port -> largest error of `after` against the reference.
    """

    state: str
    reason: str
    worst: Mapping[str, float] = field(default_factory=dict)
    errors: Mapping[str, float] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """Whether the comparison was made and held. `not checked` has not passed."""
        return self.state in ("proved", "checked")


@dataclass(frozen=True)
class _Finding:
    port: str
    measure: str
    found: float
    allowed: float
    fault: str = ""

    @property
    def ratio(self) -> float:
        if self.fault or (self.found and not self.allowed):
            return float("inf")
        return self.found / self.allowed if self.found else 0.0


def compare(
    before: Program,
    after: Program,
    inputs: Sequence[Mapping[str, Tensor]],
    *,
    exactness: Exactness,
    references: Sequence[tuple[Tensor, ...]] | None = None,
) -> Verdict:
    """Checks on `inputs` that `after` computes what `before` does.

    To keep errors from adding up over many passes, give the same `before` (the program the run
    started from) each time, with its `references`.

    Args:
        inputs: sets of inputs by port name; ports that `after` has dropped are left out for it.
        exactness: `SAME_BITS` compares bits; `WITHIN_TOLERANCE` applies the rule of this module;
            `APPROXIMATE` looks only at shapes, dtypes and whether results are finite.
        references: `reference(before, values)` for each of `inputs`, if already known.

    Raises:
        VerifyError: a node that cannot run in float64.
    """
    if _is_same(before, after):
        return Verdict("proved", "the graph and its weights are the same")
    if before.is_fake or after.is_fake or not inputs:
        why = "weights carry no data" if before.is_fake or after.is_fake else "no inputs were given"
        return Verdict("not checked", f"not checked: {why}")
    missing = _missing_ports(before, after)
    if missing:
        return Verdict("failed", missing)
    findings: list[_Finding] = []
    for number, values in enumerate(inputs):
        known = references[number] if references is not None else None
        try:
            findings += _findings(before, after, values, exactness, known)
        except VerifyError:
            raise
        except Exception as error:
            return Verdict("failed", f"the result does not run on {_sizes(values)}: {error}")
        if any(finding.ratio > 1 for finding in findings):
            return _verdict(findings, f"on inputs {_sizes(values)}", exactness)
    return _verdict(findings, f"on {len(inputs)} sets of inputs", exactness)


def compare_outputs(truth: Outputs, old: Outputs, new: Outputs, where: str) -> Verdict:
    """Checks the outputs of a file written from a program against the program's own.

    Another runtime rounds at other places in every kernel, so the worst of many rows is luck: a row
    may be off by twice what `compare` allows, and short rows are measured only together.

    Args:
        truth: the float64 run of the program, by port name.
        old: what the program gives; `new` may be twice as far off, plus the floor.
        new: what the file gives, on the same inputs.
        where: the inputs, for the reason: `on input_ids[1, 5]`.
    """
    findings: list[_Finding] = []
    for port in new:
        if fault := shape_fault(old[port], new[port]):
            findings.append(_Finding(port, "form", 1, 0, fault))
        else:
            for found in _rounding(port, truth[port], old[port], new[port]):
                by_row = found.measure == "row error"
                if not (by_row and _is_short(new[port])):
                    findings.append(replace(found, allowed=(1 + by_row) * found.allowed))
    return _verdict(findings, where, Exactness.WITHIN_TOLERANCE)


def _findings(
    before: Program,
    after: Program,
    values: Mapping[str, Tensor],
    exactness: Exactness,
    known: tuple[Tensor, ...] | None,
) -> Iterator[_Finding]:
    old, new = _run(before, values), _run(after, values)
    for port in new:
        fault = shape_fault(old[port], new[port])
        if fault:
            yield _Finding(port, "form", 1, 0, fault)
            return
    if exactness is not Exactness.WITHIN_TOLERANCE:
        look = _bits if exactness is Exactness.SAME_BITS else _finite
        yield from (look(port, old[port], new[port]) for port in new)
        return
    truth = _named(before, reference(before, values) if known is None else known)
    for port in new:
        yield from _rounding(port, truth[port], old[port], new[port])
    wide, folded = _named(after, reference(after, values)), _has_new_weights(before, after)
    for port in new:
        yield from _meaning(port, truth[port], old[port], wide[port], folded)


def _run(program: Program, values: Mapping[str, Tensor]) -> Outputs:
    names = [port.name for port in program.signature.inputs]
    return _named(program, program(**{name: values[name] for name in names}))


def _named(program: Program, values: Sequence[Tensor]) -> Outputs:
    names = [port.name for port in program.signature.outputs]
    return dict(zip(names, values, strict=True))


def _is_same(before: Program, after: Program) -> bool:
    if before.digest != after.digest or before.weights.keys() != after.weights.keys():
        return False
    return all(after.weights[name] is tensor for name, tensor in before.weights.items())


def _has_new_weights(before: Program, after: Program) -> bool:
    """Whether `after` reads a tensor that is none of those `before` reads."""
    known = {id(tensor) for tensor in before.weights.values()}
    return any(id(tensor) not in known for tensor in after.weights.values())


def _missing_ports(before: Program, after: Program) -> str:
    dropped = {name for pair in before.signature.state for name in pair}
    for side in ("inputs", "outputs"):
        old = {port.name for port in getattr(before.signature, side)}
        new = {port.name for port in getattr(after.signature, side)}
        if new - old:
            return f"{side} were added: {', '.join(sorted(new - old))}"
        if old - new - dropped:
            return f"{side} are gone that carry no state: {', '.join(sorted(old - new - dropped))}"
    return ""


def _bits(port: str, old: Tensor, new: Tensor) -> _Finding:
    count = differing_bits(old, new)
    fault = f"{count} of {old.numel()} elements differ" if count else ""
    return _Finding(port, "bits", float(count), 0.0, fault)


def _finite(port: str, old: Tensor, new: Tensor) -> _Finding:
    lost = lost_finite(old, new)
    fault = f"{lost} of {old.numel()} elements became NaN or infinite" if lost else ""
    return _Finding(port, "finiteness", float(lost), 0.0, fault)


def _rounding(port: str, truth: Tensor, old: Tensor, new: Tensor) -> Iterator[_Finding]:
    if not new.is_floating_point():
        yield _bits(port, old, new)
        return
    misplaced = misplaced_nonfinite(truth, old, new)
    if misplaced:
        fault = f"NaN or infinity differs from the reference in {misplaced} elements"
        yield _Finding(port, "NaN and infinity", misplaced, 0, fault)
        return
    floor = 4 * torch.finfo(new.dtype).eps
    for measure, found, was in relative_errors(truth, old, new):
        yield _Finding(port, measure, found, _luck(measure, new) * (2 * was + floor))


def _luck(measure: str, value: Tensor) -> float:
    """How much wider the tolerance is where it hangs on few numbers."""
    if measure == "row error" and _is_short(value):
        return 4.0
    return 2.0 if value.numel() < 256 else 1.0


def _is_short(value: Tensor) -> bool:
    return value.dim() == 0 or value.shape[-1] < 8


def _meaning(
    port: str, truth: Tensor, old: Tensor, wide: Tensor, folded: bool
) -> Iterator[_Finding]:
    if not wide.is_floating_point():
        return
    eps = torch.finfo(old.dtype).eps
    shrink = SLACK * torch.finfo(torch.float64).eps / eps
    for measure, found, was in relative_errors(truth, old, wide):
        close = _luck(measure, wide) * (2 * was + eps)
        allowed = close if folded else (2 * was + 4 * eps) * shrink
        yield _Finding(port, f"float64 {measure}", found, allowed)


def _verdict(findings: list[_Finding], where: str, exactness: Exactness) -> Verdict:
    if not findings:
        return Verdict("not checked", f"not checked: no output holds a number, {where}")
    worst: dict[str, float] = {}
    errors: dict[str, float] = {}
    for finding in findings:
        worst[finding.port] = max(worst.get(finding.port, 0.0), finding.ratio)
        if finding.measure == "error":
            errors[finding.port] = max(errors.get(finding.port, 0.0), finding.found)
    top = max(findings, key=lambda finding: finding.ratio)
    state = "failed" if top.ratio > 1 else "checked"
    return Verdict(state, f"{_reason(top, exactness)}, {where}", worst, errors)


def _reason(top: _Finding, exactness: Exactness) -> str:
    if top.fault:
        return f"output '{top.port}': {top.fault}"
    if exactness is Exactness.SAME_BITS:
        return "bit for bit the same"
    if exactness is Exactness.APPROXIMATE:
        return "shapes, dtypes and finiteness hold; quality is the budget's to judge"
    text = f"output '{top.port}': {top.measure} {top.found:.2e}, allowed {top.allowed:.2e}"
    return text if top.ratio > 1 else f"largest share of the tolerance {top.ratio:.2f}: {text}"


def _sizes(values: Mapping[str, Tensor]) -> str:
    return ", ".join(f"{name}{list(value.shape)}" for name, value in list(values.items())[:3])


__all__ = ["Verdict", "compare", "compare_outputs", "reference"]
