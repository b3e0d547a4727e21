"""Values of a rewritten program beside those of the loaded one, on the same rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from redpass.analysis.tokens import Tokens
from redpass.data import Batches
from redpass.errors import DataError
from redpass.program import Program
from redpass.verify.inputs import complete
from redpass.verify.prefix import Prefix


class Compared:
    """Runs both programs batch by batch; what did not change since is not run again.

    Args:
        program: the rewritten program; `move` replaces it.
        original: the loaded one.
    """

    def __init__(self, program: Program, original: Program, data: Batches) -> None:
        if len(data) < 2:
            raise DataError(
                "a repair needs two calibration batches, one to fit on and one to hold back",
                file=data.source,
                hint="give more rows, or a smaller --batch-size",
            )
        self.program, self.original, self.data = program, original, data
        self._now, self._was = Prefix(program, data), Prefix(original, data)
        self._rows = (Tokens(program), Tokens(original))

    def move(self, program: Program) -> None:
        """Goes on with another rewritten program: the one before with a repair more."""
        self.program = program
        self._now.move(program)

    def batches(
        self, names: Sequence[str], target: str, label: str
    ) -> Iterator[tuple[int, list[Tensor], Tensor]]:
        """Yields each batch's number, the named values of the program, and the loaded one's target.

        All as rows `[tokens, width]` in float64, without padding.

        Raises:
            DataError: a value that is NaN or infinite; `label` names the place.
        """
        for number in range(len(self.data)):
            inputs = complete(self.program, self.data[number])
            now = self._now.values(self.program, tuple(names), number)
            mine = [self._rows[0].rows(name, now[name], inputs).double() for name in names]
            was = self._was.values(self.original, (target,), number)[target]
            given = complete(self.original, self.data[number])
            if not all(bool(torch.isfinite(value).all()) for value in mine):
                raise DataError(
                    "its values on the calibration data are NaN or infinite", place=label
                )
            yield number, mine, self._rows[1].rows(target, was, given).double()
