"""Inner widths of experts whose weights are stacked: each expert keeps units of its own.

    ids [rows]                            the expert of each row; a token has one row for each pick
    h = act(bmm(up[ids], x))  [rows, I]   up [experts, I, H], or gate and up in one
    y = bmm(down[ids], h)     [rows, H]   down [experts, H, I]

All experts get one width, as they are stacked. Which units stay is told for each expert by the
tokens routed to it, and so is what takes over: second moments of its own rows, each row times the
router's weight for it. An error is counted once a token; those of a token's experts are taken to be
independent.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from redpass import ops
from redpass.analysis.widths.cuts import Rung, removal_order, ridge_strengths, rungs
from redpass.analysis.widths.narrowing import Width, Widths
from redpass.analysis.widths.resizing import resized
from redpass.analysis.widths.statistics import View
from redpass.plan import Edit, Narrow
from redpass.program import Program


@dataclass(frozen=True)
class Site:
    """What is watched of a stack of experts.

    Attributes:
        inner: value that the last matrices read, `[rows, width]`.
        ids: the expert of each row.
        picked: the router's choice, `[tokens, picks]`, of which `ids` is a flat view.
        share: weight of each row in the sum over a token's experts, or None for equal ones.
        total: value of the stream that the result is added to.
    """

    inner: fx.Node
    ids: fx.Node
    picked: fx.Node
    share: fx.Node | None
    total: fx.Node


@dataclass(frozen=True)
class ExpertRung:
    """One width of all experts.

    Attributes:
        rungs: by expert.
        rows: rows routed to each expert.
        tokens: how many tokens there were.
    """

    rungs: tuple[Rung, ...]
    rows: tuple[int, ...]
    tokens: int

    @property
    def count(self) -> int:
        """How many units each expert keeps."""
        return self.rungs[0].count

    @property
    def evidence(self) -> dict[str, float]:
        """Figures behind it."""
        strength = max(rung.strength for rung in self.rungs)
        rows = {"fewest_rows": min(self.rows), "most_rows": max(self.rows)}
        return {"tokens": self.tokens, "experts": len(self.rows), "strength": strength, **rows}

    def few(self, size: int) -> str:
        """Returns which experts saw fewer rows than they have channels, in words, or ""."""
        count = sum(rows < size for rows in self.rows)
        return f"{count} of {len(self.rows)} experts saw fewer tokens than channels" * bool(count)

    @property
    def error(self) -> float:
        """Squared error as a share of the squared stream."""
        return sum(rung.error for rung in self.rungs)

    @property
    def unrepaired(self) -> float:
        """The same without repair."""
        return sum(rung.unrepaired for rung in self.rungs)


def site_of(program: Program, width: Width, after: str) -> Site | str:
    """Returns what is to be watched of a width of experts, or why that cannot be told.

    Args:
        after: the stream's value behind the experts.
    """
    if len(width.readers) != 1 or any(h.block != 1 for h in width.holders):
        return "more than one product reads the inner width of its experts"
    reader = width.readers[0]
    product, inner = program.nodes[reader.node], program.nodes[reader.input]
    while ops.is_call(inner, "unsqueeze", "squeeze", "view", "reshape", "clone"):
        inner = inner.all_input_nodes[0]
    ids = product.all_input_nodes[0].all_input_nodes[1]
    picked = ids
    while ops.is_call(picked, "view", "reshape", "flatten", "clone", "contiguous"):
        picked = picked.all_input_nodes[0]
    choice = picked.all_input_nodes[0] if picked.all_input_nodes else picked
    if not ops.is_call(choice, "topk") or ids.meta["val"].dim() != 1 or _dims(inner) != 2:
        return "which expert a row goes to could not be told"
    return Site(inner, ids, picked, _share(product), program.nodes[after])


def _dims(node: fx.Node) -> int:
    return int(node.meta["val"].dim())


def _share(product: fx.Node) -> fx.Node | None:
    """The router's weight of each row, `[rows, 1]`, that the experts' result is multiplied by."""
    node = product
    for _ in range(4):
        if len(node.users) != 1:
            return None
        node = next(iter(node.users))
        if ops.is_call(node, "mul"):
            others = [
                a for a in node.all_input_nodes if _dims(a) == 2 and a.meta["val"].shape[1] == 1
            ]
            return others[0] if len(others) == 1 else None
    return None


def expert_rungs(
    width: Width, found: Sequence[View], rows: Tensor, counts: Sequence[int], *, refit: bool
) -> list[ExpertRung]:
    """Returns one rung for each number of units to leave in each expert."""
    made: list[list[Rung]] = []
    for view in found:
        order = removal_order(width, [view], min(counts), refit=refit)
        strengths = ridge_strengths(width, [view], order, min(counts)) if refit else {}
        made.append(rungs(width, [view], order, counts, strengths))
    tokens = found[0].whole.tokens
    picked = tuple(int(n) for n in rows)
    return [ExpertRung(each, picked, tokens) for each in zip(*made, strict=True)]


def narrow_experts(
    found: Widths, width: Width, rung: ExpertRung, program: Program
) -> Iterator[Edit]:
    """Yields the edits that leave each expert the units of its own rung."""
    keep = torch.stack([each.keep for each in rung.rungs])
    every = torch.arange(width.size)
    gone = torch.stack([every[~torch.isin(every, each)] for each in keep])
    (reader,) = width.readers
    offsets: dict[tuple[str, int], list[int]] = {}
    for holder in width.holders:
        offsets.setdefault((holder.weight, holder.axis), []).append(holder.offset)
    for (weight, axis), starts in offsets.items():
        lost = torch.cat([gone + start for start in sorted(starts)], 1)
        if weight == reader.weight and all(each.repairs for each in rung.rungs):
            spread = torch.stack([each.repairs[weight].spread for each in rung.rungs])
            yield Narrow(weight, axis, lost, keep, spread)
        else:
            yield Narrow(weight, axis, lost)
    for node in program.graph.nodes:
        yield from resized(node, found.couplings, {width.dimension: keep.shape[1]})
