"""`head_sites`: where the heads of each attention stand in the graph, and the weights they have.

For queries, keys and values: the linear that makes them, the first value that has an axis for
heads, and the one behind which heads are repeated or gathered. `head_cuts` rewrites there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from redpass import ops
from redpass.analysis.attention import SHIFT, Attentions, Operand, sources_of_heads
from redpass.analysis.cores import Core, find_cores, side_inputs
from redpass.analysis.flow import Flow
from redpass.analysis.linears import Linear, Linears, linears
from redpass.analysis.provenance import UNKNOWN
from redpass.analysis.records import Attention, Branch, Projection
from redpass.analysis.structure import structure
from redpass.facts import Facts
from redpass.program import Program

KINDS = ("query", "key", "value")


@dataclass(frozen=True, eq=False)
class Side:
    """Queries, keys or values of one attention.

    Attributes:
        kind: `query`, `key` or `value`.
        projection: the linear map that makes them, with the rows of each distinct head.
        linear: the same as a linear layer.
        operand: the nodes from there to the core.
        node: what the core reads.
        of_head: for each head of the core, which distinct head it reads.
    """

    kind: str
    projection: Projection
    linear: Linear
    operand: Operand
    node: fx.Node
    of_head: tuple[int, ...]

    @property
    def heads(self) -> int:
        """Distinct heads."""
        return len(self.projection.rows)

    @property
    def width(self) -> int:
        """Channels of a head."""
        return len(self.projection.rows[0])

    @property
    def features(self) -> Tensor:
        """Rows of the linear's matrix, `[heads, width]`."""
        return torch.tensor([list(row) for row in self.projection.rows])

    def weight(self, program: Program) -> Tensor:
        """Returns the matrix, `[heads, width, ins]`."""
        return self.linear.matrix(program)[self.features]

    def bias(self, program: Program) -> Tensor | None:
        """Returns the bias, `[heads, width]`, wherever it is added."""
        name = self.projection.bias
        return None if name is None else program.weights[name][self.features]

    def place(self, node: fx.Node, rows: Tensor, partial: bool = False) -> tuple[int, int] | None:
        """Returns the axes of heads and of channels of a value that holds `rows`, or None.

        Args:
            rows: `[heads, width]`, rows of the matrix.
            partial: whether other positions may come from elsewhere (from a cache).
        """
        held = self.operand.known.get(node)
        if not isinstance(held, Tensor) or held.dim() < 3:
            return None
        held = torch.where(held == UNKNOWN, held, held & ((1 << SHIFT) - 1))
        for heads in range(held.dim()):
            for channels in range(held.dim()):
                sizes = heads != channels and (held.shape[heads], held.shape[channels])
                if sizes == tuple(rows.shape) and _is_fixed(node, heads):
                    lines = held.movedim((heads, channels), (-2, -1)).reshape(-1, *rows.shape)
                    same = (lines == rows).flatten(1).all(1)
                    unknown = (lines == UNKNOWN).flatten(1).all(1) & partial
                    if same.any() and (same | unknown).all():
                        return heads, channels
        return None


@dataclass(frozen=True, eq=False)
class HeadSite:
    """One attention whose heads are known from the projections to the core and behind it.

    Attributes:
        label: that of its branch.
        sides: queries, keys and values by kind.
        output: the linear that reads the heads.
        columns: `[heads, value width]`, columns of the output's matrix.
    """

    label: str
    program: Program
    branch: Branch
    attention: Attention
    core: Core
    flow: Flow
    sides: Mapping[str, Side]
    output: Linear
    columns: Tensor

    @property
    def heads(self) -> int:
        """Heads of the core: those that a sum of values is formed for."""
        return self.attention.heads

    @property
    def groups(self) -> tuple[tuple[int, ...], ...]:
        """For each distinct key head the query heads that meet it."""
        of_head = self.sides["key"].of_head
        count = self.sides["key"].heads
        return tuple(tuple(h for h in range(self.heads) if of_head[h] == g) for g in range(count))

    def output_weight(self) -> Tensor:
        """Returns the output's matrix, `[outs, heads, value width]`."""
        return self.output.matrix(self.program)[:, self.columns]


@dataclass(frozen=True)
class HeadSites:
    """Attentions that can be looked into, and why the others cannot, by branch label."""

    found: Mapping[str, HeadSite]
    reasons: Mapping[str, str]


def head_sites(program: Program, facts: Facts) -> HeadSites:
    """Finds the heads of every attention of a branch."""
    flow = Flow(program)
    cores = {core.node.name: core for core in find_cores(flow)}
    known = facts.get(structure)
    flow.side_inputs = side_inputs(flow, tuple(cores.values()))
    walks = Attentions(flow, known.norms)
    found: dict[str, HeadSite] = {}
    reasons: dict[str, str] = {}
    for branch in known.branches:
        if branch.attention is not None:
            core = cores[branch.attention.node]
            site = _site(program, branch, core, walks, facts.get(linears))
            if isinstance(site, HeadSite):
                found[branch.label] = site
            else:
                reasons[branch.label] = site
    return HeadSites(found, reasons)


def _site(
    program: Program, branch: Branch, core: Core, walks: Attentions, known: Linears
) -> HeadSite | str:
    attention = branch.attention
    assert attention is not None
    sides: dict[str, Side] = {}
    nodes = (core.query, core.key, core.value)
    for kind, node in zip(KINDS, nodes, strict=True):
        operand = walks.operand(node, swapped=kind == "key" and not core.is_fused)
        side = _side(kind, getattr(attention, kind), operand, attention.heads, known)
        if isinstance(side, str):
            return side
        sides[kind] = side
    output = attention.output
    linear = known.by_node.get(output.node) if output is not None else None
    if output is None or linear is None:
        return "what reads its heads is no plain linear layer"
    if shared := known.shared(linear.names):
        return f"the weight '{shared}' has other readers"
    sizes = {len(row) for row in output.rows}
    if len(output.rows) != attention.heads or sizes != {sides["value"].width}:
        return "which columns of the output projection read which head could not be told"
    columns = torch.tensor([list(row) for row in output.rows])
    return HeadSite(
        branch.label, program, branch, attention, core, walks.flow, sides, linear, columns
    )


def _side(
    kind: str, projection: Projection | None, operand: Operand, heads: int, known: Linears
) -> Side | str:
    linear = None if projection is None else known.by_node.get(projection.node)
    if projection is None or linear is None:
        return f"no plain linear layer makes its {_plural(kind)}"
    if shared := known.shared(linear.names):
        return f"the weight '{shared}' has other readers"
    of_head = sources_of_heads(operand.rows, heads)
    widths = {len(row) for row in projection.rows}
    if len(of_head) != heads or len(widths) != 1 or heads < 2:
        return f"which {_plural(kind)} are which head's could not be told"
    return Side(kind, projection, linear, operand, operand.node, of_head)


def _plural(kind: str) -> str:
    return {"query": "queries", "key": "keys", "value": "values"}[kind]


def chosen(sites: HeadSites, only: Sequence[str]) -> dict[str, HeadSite | str]:
    """Returns site, or reason, of each label, in order; of all where none is named."""
    labels = only or [*sites.found, *sites.reasons]
    return {label: sites.found.get(label) or sites.reasons[label] for label in labels}


def _is_fixed(node: fx.Node, axis: int) -> bool:
    """Whether an axis has a size that is a number."""
    return isinstance(ops.expression(node.meta["val"].shape[axis]), int)
