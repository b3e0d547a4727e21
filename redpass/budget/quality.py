"""Measuring what a budget limits, on one part of the data, quickly for many programs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from functools import partial

from torch import Tensor

from redpass.budget.spec import Budget
from redpass.fingerprint import fingerprint
from redpass.program import Program
from redpass.record import QualityRecord, from_json
from redpass.verify.estimate import Estimate
from redpass.verify.metrics import evaluate_all, find_metric
from redpass.verify.originals import Originals
from redpass.verify.prefix import Prefix

Outputs = Callable[[int], Tensor]
Quality = dict[str, QualityRecord]
"""Metric name -> record."""


def measure(
    budget: Budget,
    program: Program | Callable[[], Program],
    originals: Originals,
    split: str,
    outputs: Callable[[Program, int], Tensor] | None = None,
    *,
    mark: str = "",
) -> Quality:
    """Measures every limit's metric on the data of `originals`, or recalls what was measured.

    Args:
        program: what is measured, or what makes it.
        outputs: gives a program's output on a batch; None runs the program.
        mark: the program's fingerprint where it is known; the program is then made only when it
            has to be measured.
    """
    name = f"quality, {split}, {len(originals.batches)} batches"

    def made() -> Program:
        return program if isinstance(program, Program) else program()

    def compute() -> dict[str, object]:
        judged = made()
        own = partial(outputs, judged) if outputs else None
        found = _measure(budget, judged, originals, split, own)
        return {metric: asdict(record) for metric, record in found.items()}

    def of() -> str:
        return f"program {mark or fingerprint(made())}"

    kept = originals.journal.recall(name, compute, of)
    return {metric: from_json(QualityRecord, record) for metric, record in kept.items()}


def _measure(
    budget: Budget, program: Program, originals: Originals, split: str, outputs: Outputs | None
) -> Quality:
    metrics = {limit.metric: find_metric(limit.metric) for limit in budget.limits}
    found = evaluate_all(
        list(metrics.values()),
        program,
        originals.program,
        originals.batches,
        originals=originals,
        outputs=outputs,
    )
    return {
        limit.metric: _record(
            found[metrics[limit.metric].name], metrics[limit.metric].better, str(limit), split
        )
        for limit in budget.limits
    }


def _record(estimate: Estimate, better: str, limit: str, split: str) -> QualityRecord:
    return QualityRecord(
        metric=limit.partition("<=")[0].partition(">=")[0],
        split=split,
        better=better,
        original=estimate.original,
        value=estimate.value,
        difference=estimate.difference,
        stderr=estimate.difference_stderr,
        count=estimate.count,
        limit=limit,
    )


def worse_by(record: QualityRecord) -> float:
    """Returns how much worse than the original the program is, negative when it is better."""
    return record.difference if record.better == "lower" else -record.difference


def figures(quality: Quality) -> str:
    """Returns what was measured in words, for the outcome of an action."""
    found = (f"{r.metric} {r.value:.5g} ± {r.stderr:.2g}" for r in quality.values())
    return f"{', '.join(found)} on choosing data"


class Judge:
    """Quality of programs that differ little from one another, on one part of the data.

    What they share is run once: see `Prefix`.

    Args:
        base: the program the others are made from.
        few: the original's outputs on the first batches alone, for a quick look.
    """

    def __init__(
        self,
        budget: Budget,
        base: Program,
        originals: Originals,
        split: str,
        few: Originals | None = None,
    ) -> None:
        self.budget, self.originals, self.split = budget, originals, split
        self.few = few or originals
        self.prefix = Prefix(base, originals.batches, originals.port)
        self._next: Callable[[], Program] | None = None
        for known in {self.originals, self.few}:
            known.quicker = lambda number: self._output(originals.program, number)

    def measure(
        self, program: Program | Callable[[], Program], *, quick: bool = False, mark: str = ""
    ) -> Quality:
        """Measures a program on all batches, or on the few; arguments as of `measure`."""
        originals = self.few if quick else self.originals
        return measure(self.budget, program, originals, self.split, self._output, mark=mark)

    def move(self, base: Callable[[], Program]) -> None:
        """Makes `base()` what later programs are compared with, asked when one is run."""
        self._next = base

    def _output(self, program: Program, number: int) -> Tensor:
        if self._next:
            self.prefix.move(self._next())
            self._next = None
        return self.prefix.output(program, number)
