"""Facts: what analyses found about one program, computed once and frozen.

An analysis is a function `(program, facts) -> frozen result`. A `Facts` belongs to one program
and dies with it, so a result can never be asked of another graph.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from redpass.data import Batches
from redpass.errors import DataError, PassError, UsageError
from redpass.fingerprint import fingerprint
from redpass.journal import JSON, Journal
from redpass.program import Program, check_port
from redpass.verify.inputs import complete

T = TypeVar("T")
Analysis = Callable[[Program, "Facts"], T]


@dataclass
class Facts:
    """The results known for `program`.

    Args:
        program: the program all results are about.
        calibration: data for analyses that measure activations, or None.
        journal: keeps what analyses measured, for a run that is resumed.
    """

    program: Program
    calibration: Batches | None = None
    journal: Journal = field(default_factory=Journal)
    _results: dict[Any, Any] = field(default_factory=dict)
    _allowed: tuple[Any, ...] | None = None

    def get(self, analysis: Analysis[T]) -> T:
        """Returns what `analysis` found, computing it at the first call.

        Raises:
            PassError: the running pass did not list this analysis in `needs`.
        """
        if self._allowed is not None and analysis not in self._allowed:
            raise PassError(f"analysis '{analysis.__name__}' is not in the pass's `needs`")
        if analysis not in self._results:
            unrestricted = Facts(self.program, self.calibration, self.journal, self._results)
            self._results[analysis] = analysis(self.program, unrestricted)
        return self._results[analysis]  # type: ignore[no-any-return]

    def restrict(self, analyses: tuple[Any, ...]) -> Facts:
        """Returns a view that answers for `analyses` only and shares all results."""
        return Facts(self.program, self.calibration, self.journal, self._results, analyses)

    def recall(self, name: str, compute: Callable[[], JSON]) -> JSON:
        """Returns what an interrupted run measured on this program as `name`, or measures it.

        For figures that take a run over the calibration data. They come back as JSON holds them.
        """
        return self.journal.recall(name, compute, lambda: f"program {fingerprint(self.program)}")

    def data(self) -> Batches:
        """Returns the calibration data.

        Raises:
            DataError: there is none, or the program takes no such inputs.
        """
        if self.calibration is None:
            raise DataError(
                "this analysis measures activations and no data was given", hint="pass --data FILE"
            )
        if _check_data not in self._results:
            _check_data(self.program, self.calibration)
            self._results[_check_data] = None
        return self.calibration


def _check_data(program: Program, data: Batches) -> None:
    """Refuses what a call of the program would: analyses run its nodes one by one."""
    for batch in data:
        inputs = complete(program, batch)
        for port in program.signature.inputs:
            try:
                check_port(port, inputs[port.name])
            except UsageError as error:
                hint = "give rows of that dtype and those sizes"
                raise DataError(
                    error.found, file=data.source, place=error.place, hint=hint
                ) from error
