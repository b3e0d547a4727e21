"""Whether an attention lets turns of its planes through: tried on one batch, not believed."""

from __future__ import annotations

from functools import cached_property

import torch

from redpass.analysis.heads.clover import Keys
from redpass.analysis.heads.cuts import HeadCut, Part
from redpass.analysis.heads.fits import HeadFits
from redpass.analysis.heads.ladders import SAME
from redpass.analysis.heads.planes import Planes
from redpass.analysis.heads.rotated import RotatedKeys
from redpass.analysis.heads.sites import HeadSite
from redpass.analysis.statistics import Statistics
from redpass.data import Batches
from redpass.facts import Facts
from redpass.program import Program


class Trial:
    """Measured queries and keys; rotations are tried on one batch before they are believed."""

    def __init__(self, program: Program, facts: Facts) -> None:
        self.program, self.facts = program, facts

    def keys(self, site: HeadSite, sums: Statistics, planes: Planes | None) -> Keys | RotatedKeys:
        """Returns what measures cuts; one that refuses them where rotations are none."""
        if planes is None:
            return Keys(self.program, site, sums)
        found = RotatedKeys(self.program, site, sums, planes)
        if not planes.norms:
            tried = self.fits.fits(site, {0: turned(site, planes)}, refit=False)[0]
            if isinstance(tried, str):
                found.refused = tried
            elif tried.loss > SAME:
                found.refused = "something beside rotations stands between its channels and scores"
        return found

    @cached_property
    def fits(self) -> HeadFits:
        """What runs attentions on the first batch."""
        data = self.facts.data()
        return HeadFits(self.program, Batches((data[0],), data.source))


def turned(site: HeadSite, planes: Planes) -> HeadCut:
    """Returns an attention turned in every way that rotations let through: it gives what it gave.

    That it does is tried before anything is cut.
    """
    generator = torch.Generator().manual_seed(0)
    count, rest = len(planes.first), torch.tensor(planes.rest, dtype=torch.long)
    angle = 6.0 * torch.rand(count, generator=generator, dtype=torch.float64)
    size = 0.5 + torch.rand(count, generator=generator, dtype=torch.float64)
    free = torch.randn(len(rest), len(rest), generator=generator, dtype=torch.float64)
    free = torch.linalg.qr(free)[0] if len(rest) else free
    parts = []
    for kind, by in (("query", size), ("key", 1.0 / size)):
        side = site.sides[kind]
        matrix = torch.zeros(side.width, side.width, dtype=torch.float64)
        a, b = torch.tensor(planes.first), torch.tensor(planes.second)
        matrix[a, a] = matrix[b, b] = by * angle.cos()
        matrix[a, b], matrix[b, a] = by * angle.sin(), -by * angle.sin()
        matrix[rest[:, None], rest] = free
        bias = side.bias(site.program)
        shift = None if bias is None else bias.double() @ matrix.T
        kept = torch.arange(side.width).expand(side.heads, -1)
        parts.append(Part(matrix @ side.weight(site.program).double(), shift, kept))
    return HeadCut(query=parts[0], key=parts[1], planes=planes)
