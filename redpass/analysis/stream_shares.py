"""What an error in the output of a linear is worth: the share of the residual stream that is off.

The error of a linear that writes to the stream is that itself; inside of a branch, the share of
the linear's own output that is off is taken to be the share of the branch that is off. Outside of
any branch it is the share of the output.
"""

from __future__ import annotations

from functools import cached_property

from redpass.analysis.flow import Flow
from redpass.analysis.linears import Linear
from redpass.analysis.observers import Spread
from redpass.analysis.statistics import Statistics
from redpass.analysis.stream_statistics import total
from redpass.analysis.structure import Branch, structure
from redpass.facts import Facts
from redpass.program import Program


class Scales:
    """What a squared error of a linear's output is worth, in shares of the squared stream."""

    def __init__(self, program: Program, facts: Facts) -> None:
        self.program, self.branches = program, facts.get(structure).branches

    @cached_property
    def _branch_of(self) -> dict[str, Branch]:
        return {name: branch for branch in self.branches for name in branch.path}

    @cached_property
    def _exits(self) -> frozenset[str]:
        """The linears whose output is what a branch adds, up to views and copies."""
        flow = Flow(self.program)
        nodes = self.program.nodes
        return frozenset(flow.peel(nodes[branch.exit]).name for branch in self.branches)

    def values(self, linear: Linear) -> tuple[str, ...]:
        """The nodes whose squares are needed besides the linear's own output."""
        branch = self._branch_of.get(linear.node)
        return () if branch is None else (branch.exit, total(branch))

    def of(self, linear: Linear, sums: Statistics, *, is_centred: bool) -> float:
        """The factor from squared error per token to predicted loss."""
        own = _square(sums, linear.node, is_centred=is_centred)
        branch = self._branch_of.get(linear.node)
        if branch is None:
            return 1.0 / own
        stream = _square(sums, total(branch))
        if linear.node in self._exits:
            return 1.0 / stream
        return _square(sums, branch.exit) / stream / own

    @staticmethod
    def share(branch: Branch, sums: Statistics) -> float:
        """Returns the squared contribution of a branch as a share of the squared stream."""
        return _square(sums, branch.exit) / _square(sums, total(branch))


def _square(sums: Statistics, name: str, *, is_centred: bool = False) -> float:
    """The squared norm per token, or the variance."""
    mean, square = sums.mean(Spread(name))
    found = (square - mean.square()).clamp_min(0.0) if is_centred else square
    return max(float(found.sum()), 1e-30)
