"""`structure`: residual stream, branches, layers and what is in them, from data flow alone.

Module names serve as labels in reports and nothing else: a graph without them gives the same
structure under other labels.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from torch import fx

from redpass import ops
from redpass.analysis.branches import Region, Regions, weights_on
from redpass.analysis.cores import Core, find_cores
from redpass.analysis.flow import Flow
from redpass.analysis.labels import branch_labels, module_path
from redpass.analysis.layers import fingerprint, layer_indices
from redpass.analysis.norms import find_norms
from redpass.analysis.records import (
    Attention,
    Branch,
    CouplingGroup,
    Experts,
    FeedForward,
    Layer,
    Member,
    Norm,
    Projection,
    Rotary,
    Structure,
)
from redpass.analysis.stream import Skip, chain, find_skips, is_learned, outermost
from redpass.program import Program

if TYPE_CHECKING:
    from redpass.facts import Facts

__all__ = [
    "Attention", "Branch", "CouplingGroup", "Experts", "FeedForward", "Layer", "Member", "Norm",
    "Projection", "Rotary", "Structure", "structure",
]  # fmt: skip


def structure(program: Program, facts: Facts | None = None) -> Structure:
    """Finds what `Structure` holds. Never fails on an unknown graph: `notes` says what is missing.

    Time grows linearly with the graph. Weights are looked at by shape, except single numbers.
    """
    del facts
    flow = Flow(program)
    norms = find_norms(flow)
    cores = find_cores(flow)
    skips, notes = find_skips(flow)
    skips = outermost(skips, frozenset(core.node for core in cores))
    branches = _branches(flow, norms, cores, chain(flow, skips))
    stream = tuple(dict.fromkeys(name for b in branches for name in (b.entry, b.after)))
    return Structure(branches, (), stream, norms, (), tuple(notes))


def _branches(
    flow: Flow, norms: tuple[Norm, ...], cores: tuple[Core, ...], streams: list[list[Skip]]
) -> tuple[Branch, ...]:
    regions = Regions(flow, norms)
    found: list[tuple[Region, Branch]] = []
    numbers: list[int] = []
    layer = 0
    for number, skips in enumerate(streams):
        mine = [region for skip in skips for region in regions.of(skip)]
        kinds = [_kind(cores, r) for r in mine]
        codes = [fingerprint(flow, r) for r in mine]
        indices = layer_indices(kinds, [skips.index(r.skip) for r in mine], codes)
        for region, kind, index in zip(mine, kinds, indices, strict=True):
            found.append((region, _branch(flow, region, kind, layer + index)))
            numbers.append(number)
        layer += indices[-1] + 1
    paths = [module_path([n for n in r.path if is_learned(flow, n)]) for r, _ in found]
    labels = branch_labels([b.kind for _, b in found], paths, [b.layer for _, b in found], numbers)
    return tuple(replace(b, label=label) for (_, b), label in zip(found, labels, strict=True))


def _kind(cores: tuple[Core, ...], region: Region) -> str:
    if any(core.node in region.path for core in cores):
        return "attention"
    if any(ops.is_call(node, "topk") for node in region.path):
        return "experts"
    return "feed-forward"


def _branch(flow: Flow, region: Region, kind: str, layer: int) -> Branch:
    def names(nodes: frozenset[fx.Node]) -> frozenset[str]:
        return frozenset(node.name for node in nodes)

    return Branch(
        label="",
        kind=kind,
        entry=region.skip.entry.name,
        exit=region.term.node.name,
        join=region.term.join.name,
        other=region.term.other.name,
        after=region.after.name,
        form=region.form,
        nodes=names(region.own),
        path=names(region.path),
        layer=layer,
        state=region.state,
        weights=weights_on(flow, region.path),
    )
