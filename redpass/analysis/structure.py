"""`structure`: residual stream, branches, layers and what is in them, from data flow alone.

Module names serve as labels in reports and nothing else: a graph without them gives the same
structure under other labels.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from redpass.analysis.branches import Region, Regions, weights_on
from redpass.analysis.cores import Core, find_cores, side_inputs
from redpass.analysis.describe import Content, Describer
from redpass.analysis.flow import Flow
from redpass.analysis.groups import coupling_groups
from redpass.analysis.labels import branch_labels, module_path
from redpass.analysis.layers import fingerprint, layer_indices
from redpass.analysis.members import CouplingGroup, Member
from redpass.analysis.norms import find_norms
from redpass.analysis.records import (
    Attention,
    Branch,
    Experts,
    FeedForward,
    Layer,
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
    flow.side_inputs = side_inputs(flow, cores)
    skips, notes = find_skips(flow)
    skips = outermost(skips, frozenset(core.node for core in cores))
    streams = chain(flow, skips)
    describer = Describer(flow, norms, cores)
    drafts = _drafts(flow, norms, streams, describer)
    branches = _labelled(flow, drafts)
    notes += _notes(cores, branches)
    notes += describer.notes + describer.attentions.notes
    found = Structure(
        branches=branches,
        layers=_layers(drafts, branches),
        stream=_values(branches),
        norms=norms,
        notes=tuple(dict.fromkeys(notes)),
        streams=tuple(
            _values([b for d, b in zip(drafts, branches, strict=True) if d.stream == number])
            for number in range(len(streams))
        ),
    )
    return replace(found, coupling_groups=coupling_groups(flow, found))


@dataclass(frozen=True, eq=False)
class Draft:
    """A branch before it has a label."""

    region: Region
    content: Content
    code: str
    layer: int
    stream: int


def _drafts(
    flow: Flow, norms: tuple[Norm, ...], streams: list[list[Skip]], describer: Describer
) -> list[Draft]:
    regions = Regions(flow, norms)
    drafts: list[Draft] = []
    first = 0
    for number, skips in enumerate(streams):
        mine = [(place, r) for place, skip in enumerate(skips) for r in regions.of(skip)]
        contents = [describer.content(r) for _, r in mine]
        codes = [fingerprint(flow, r) for _, r in mine]
        kinds = [content.kind for content in contents]
        indices = layer_indices(kinds, [place for place, _ in mine], codes)
        for (_, region), content, code, index in zip(mine, contents, codes, indices, strict=True):
            drafts.append(Draft(region, content, code, first + index, number))
        first += indices[-1] + 1
    return drafts


def _labelled(flow: Flow, drafts: list[Draft]) -> tuple[Branch, ...]:
    labels = branch_labels(
        [draft.content.kind for draft in drafts],
        [module_path([n for n in d.region.path if is_learned(flow, n)]) for d in drafts],
        [draft.layer for draft in drafts],
        [draft.stream for draft in drafts],
    )
    return tuple(_branch(flow, d, label) for d, label in zip(drafts, labels, strict=True))


def _branch(flow: Flow, draft: Draft, label: str) -> Branch:
    region = draft.region
    return Branch(
        label=label,
        kind=draft.content.kind,
        entry=region.skip.entry.name,
        exit=region.term.node.name,
        join=region.term.join.name,
        other=region.term.other.name,
        after=region.after.name,
        form=region.form,
        nodes=frozenset(node.name for node in region.own),
        path=frozenset(node.name for node in region.path),
        layer=draft.layer,
        state=region.state,
        weights=weights_on(flow, region.path),
        attention=draft.content.attention,
        feed_forward=draft.content.feed_forward,
        experts=draft.content.experts,
    )


def _layers(drafts: list[Draft], branches: tuple[Branch, ...]) -> tuple[Layer, ...]:
    codes: dict[int, list[str]] = {}
    labels: dict[int, list[str]] = {}
    streams = {draft.layer: draft.stream for draft in drafts}
    for draft, branch in zip(drafts, branches, strict=True):
        codes.setdefault(draft.layer, []).append(draft.code)
        labels.setdefault(draft.layer, []).append(branch.label)
    first: dict[tuple[str, ...], int] = {}
    return tuple(
        Layer(i, tuple(labels[i]), first.setdefault(tuple(codes[i]), i), streams[i])
        for i in sorted(codes)
    )


def _values(branches: Iterable[Branch]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for b in branches for name in (b.entry, b.after)))


def _notes(cores: tuple[Core, ...], branches: tuple[Branch, ...]) -> list[str]:
    notes = []
    if not branches:
        notes.append("no residual stream: no add whose one operand the other one is made from")
    elif not cores:
        notes.append("no attention: no softmax between products of two computed values")
    outside = [c for c in cores if not any(c.node.name in b.path for b in branches)]
    notes += [f"{core.node.name}: an attention outside of any branch" for core in outside]
    return notes
