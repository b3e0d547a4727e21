"""Output projections fitted anew to what the attention gave, once it has other heads.

With `F` what the new heads give, `z` what the old ones gave and `W_o` their projection, the new
columns are

    argmin over W of  E || W_o z - W F ||^2 + strength * || W - W' ||^2,

where `W'` are the old columns carried over, in closed form from sums over calibration tokens; the
strength is the one that is best on batches that were not fitted on, and with no gain there `W'`
stays. The error is also the predicted loss: on all batches, as a share of `E || x ||^2`, the
stream behind the attention.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from redpass import rewrite
from redpass.analysis.heads.cuts import HeadCut, Unfit, edits
from redpass.analysis.heads.sites import HeadSite
from redpass.analysis.ridge import Sums, best_fit, is_held_back
from redpass.analysis.stream_statistics import total
from redpass.analysis.tokens import Tokens
from redpass.data import Batches
from redpass.errors import DataError
from redpass.plan import Action
from redpass.program import Program
from redpass.verify.inputs import complete
from redpass.verify.prefix import Prefix

EXACT = 1e-12
"""An error below this is rounding: there is nothing to fit."""


@dataclass(frozen=True)
class Fit:
    """A cut with its output projection fitted, or not.

    Attributes:
        cut: with the columns that are used.
        loss: expected squared error in the stream, as a share of its expected squared norm.
        unfitted: the same with the columns carried over.
        tokens: how many tokens the sums are over.
    """

    cut: HeadCut
    loss: float
    unfitted: float
    tokens: int


class HeadFits:
    """Measures and fits cuts of the attentions of one program, one attention at a time."""

    def __init__(self, program: Program, data: Batches) -> None:
        self.program, self.data = program, data
        self.prefix = Prefix(program, data)
        self.tokens = Tokens(program)

    def fits(
        self, site: HeadSite, cuts: Mapping[int, HeadCut], *, refit: bool
    ) -> dict[int, Fit | str]:
        """Returns each cut of one attention fitted, or why the graph cannot have it.

        Args:
            refit: whether columns may be fitted; otherwise losses are measured only.

        Raises:
            DataError: values on the calibration data that are NaN or infinite.
        """
        found: dict[int, Fit | str] = {}
        works: dict[int, _Work] = {}
        for count, cut in cuts.items():
            try:
                works[count] = _Work(self, site, cut)
            except Unfit as reason:
                found[count] = str(reason)
        for number in range(len(self.data)) if works else ():
            inputs = complete(self.program, self.data[number])
            names = (site.output.input, total(site.branch))
            known = self.prefix.values(self.program, names, number)
            old, stream = (self.rows(site, name, known[name], inputs) for name in names)
            for work in works.values():
                work.add(old, stream, inputs, number)
        return {
            count: works[count].fit(refit) if count in works else found[count] for count in cuts
        }

    def rows(
        self, site: HeadSite, name: str, value: Tensor, inputs: Mapping[str, Tensor]
    ) -> Tensor:
        """Returns a value as rows of tokens. Raises `DataError` for NaN and infinities."""
        found = self.tokens.rows(name, value, inputs).double()
        if not bool(torch.isfinite(found).all()):
            text = "its values on the calibration data are NaN or infinite"
            raise DataError(text, place=site.label)
        return found


class _Work:
    """The sums for one cut, in two parts: what is fitted on and what is held back."""

    def __init__(self, owner: HeadFits, site: HeadSite, cut: HeadCut) -> None:
        self.owner, self.site = owner, site
        output = site.output_weight() if cut.output is None else cut.output
        self.cut = replace(cut, output=output)
        self.has_bias = site.output.bias is not None
        # What the projection reads, head after head: as it mostly lies.
        columns = site.columns.flatten()
        self.order = columns if len(columns) == output.shape[1] * output.shape[2] else None
        action = Action("heads", site.label, edits(site, self.cut, "tried"), "")
        self.program = rewrite.apply(owner.program, [action])
        width = output.shape[1] * output.shape[2] + self.has_bias
        self.sums = [Sums(width, site.output.outs) for _ in range(2)]
        self.matrix = site.output.matrix(site.program).double()
        self.plain = output.flatten(1).double()
        self.count = 0

    def add(self, old: Tensor, stream: Tensor, inputs: Mapping[str, Tensor], number: int) -> None:
        """Adds one batch."""
        name = self.site.output.input
        value = self.owner.prefix.values(self.program, (name,), number)[name]
        new = self.owner.rows(self.site, name, value, inputs)
        if self.order is not None:
            new = new[:, self.order]
        gap = old @ self.matrix.T - new @ self.plain.T
        if self.has_bias:
            new = torch.nn.functional.pad(new, (0, 1), value=1.0)
        part = self.sums[is_held_back(number)]
        part.add(new, gap, float(stream.square().sum()))
        self.count += len(old)

    def fit(self, refit: bool) -> Fit:
        """Solves for the columns."""
        fitted, held = self.sums
        whole = fitted + held
        before = whole.error(None)
        if not refit or held.size == 0.0 or not before > EXACT:
            return Fit(self.cut, before, before, self.count)
        found = best_fit(self.sums, has_bias=self.has_bias)
        if not found.gains:
            return Fit(self.cut, before, before, self.count)
        return Fit(self._with(found.change), whole.error(found.change), before, self.count)

    def _with(self, change: Tensor) -> HeadCut:
        output, site = self.cut.output, self.site
        assert output is not None
        width = output.shape[1] * output.shape[2]
        columns = output + change[:width].T.reshape(output.shape).to(output.dtype)
        offset = site.output.offset(site.program)
        if not self.has_bias or offset is None:
            return replace(self.cut, output=columns)
        bias = (offset.double() + change[width]).to(offset.dtype)
        return replace(self.cut, output=columns, output_bias=bias)


def check_batches(data: Batches) -> None:
    """Raises `DataError` where there are not two batches, one of them to hold back."""
    if len(data) < 2:
        raise DataError(
            "fitting heads needs two calibration batches, one to fit on and one to hold back",
            file=data.source,
            hint="give more rows, a smaller --batch-size, or refit=False",
        )
