"""Attentions in which heads share scores, as `HeadCut`s in one of two layouts.

    gather: query and key heads of the representatives alone, repeated for the core; every head
            keeps its value. Fewer rows in `W_q` and `W_k`, a smaller K cache; the core does as
            much as before, unless it is lowered to `redpass::clustered_attention`.
    wide:   per cluster one query and key head and the values of all members side by side, so the
            core has a head for each cluster and its values are wider than its keys. Scores and
            softmax are computed once a cluster by any runtime.

Two heads of a cluster that read the same value head give equal outputs: one stays, with the sum
of their columns of `W_o`. Both layouts are exact when the heads of a cluster have equal
probabilities. Measured (one core, 16 heads, 1024 positions): the wide one takes 0.71 and 0.56 of
the time in ONNX Runtime's `Attention` for clusters of 2 and 4, and 2.0 in PyTorch's eager SDPA,
whose fused kernel wants one width; the gathered one is never slower by more than the copies of
keys. `auto` is wide where nothing is padded, else gathered: for eager PyTorch ask for `gather`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from redpass.analysis.heads.clusters import Clusters
from redpass.analysis.heads.cuts import HeadCut, Part, Unfit, part
from redpass.analysis.heads.sites import HeadSite

LAYOUTS = ("auto", "gather", "wide")

PADDING = 0.25
"""The wide layout may add so many zeros to the values, as a share."""


def shared_scores(site: HeadSite, found: Clusters, layout: str) -> HeadCut:
    """Returns the cut in which only the representatives of clusters have queries and keys.

    Args:
        layout: one of `LAYOUTS`.

    Raises:
        Unfit: the wide layout does not fit these clusters.
    """
    if layout == "gather":
        return _gathered(site, found)
    if layout == "wide":
        return _wide(site, found, PADDING)
    try:
        return _wide(site, found, 0.0)
    except Unfit:
        return _gathered(site, found)


def _pairs(site: HeadSite, found: Clusters) -> dict[tuple[int, int], list[int]]:
    """Heads by cluster and value head: those in one entry give equal outputs."""
    values, cluster_of = site.sides["value"].of_head, found.of_head
    pairs: dict[tuple[int, int], list[int]] = {}
    for head in range(site.heads):
        pairs.setdefault((cluster_of[head], values[head]), []).append(head)
    return pairs


def _key_of(site: HeadSite, found: Clusters) -> list[int]:
    """The key head of each cluster's representative."""
    return [site.sides["key"].of_head[head] for head in found.representatives]


def _query_heads(site: HeadSite, heads: Sequence[int]) -> list[int]:
    """Which distinct query head each of these heads reads: itself, as a rule."""
    return [site.sides["query"].of_head[head] for head in heads]


def _gathered(site: HeadSite, found: Clusters) -> HeadCut:
    pairs = _pairs(site, found)
    keys = _key_of(site, found)
    used = sorted(set(keys))
    weight = site.output_weight()
    is_same = len(pairs) == site.heads
    return HeadCut(
        query=part(site, "query", _query_heads(site, found.representatives)),
        key=None if len(used) == site.sides["key"].heads else part(site, "key", used),
        output=None if is_same else merged_columns(weight, list(pairs.values())),
        query_of=tuple(cluster for cluster, _ in pairs),
        key_of=tuple(used.index(keys[cluster]) for cluster, _ in pairs),
        value_of=() if is_same else tuple(value for _, value in pairs),
        source_of=tuple(found.representatives[cluster] for cluster, _ in pairs),
    )


def merged_columns(weight: Tensor, heads: Sequence[Sequence[int]]) -> Tensor:
    """Returns `[outs, len(heads), width]`: for each entry the sum of its heads' columns."""
    return torch.stack([weight[:, list(own)].sum(1) for own in heads], dim=1)


def _wide(site: HeadSite, found: Clusters, padding: float) -> HeadCut:
    pairs, keys = _pairs(site, found), _key_of(site, found)
    used = sorted(set(keys))
    slots = [[c for c, key in enumerate(keys) if key == own] for own in used]
    if len({len(own) for own in slots}) > 1:
        raise Unfit("its key heads would have different numbers of query heads")
    blocks = [sorted({value for c, value in pairs if c in own}) for own in slots]
    most, value = max(map(len, blocks)), site.sides["value"]
    if len(used) * most > (1 + padding) * value.heads:
        raise Unfit(
            f"values of {len(used)} x {most} heads for {value.heads}: too much would be padding"
        )
    order = [cluster for own in slots for cluster in own]
    representatives = [found.representatives[cluster] for cluster in order]
    return HeadCut(
        query=part(site, "query", _query_heads(site, representatives)),
        key=part(site, "key", used),
        value=_side_by_side(site, blocks, most),
        output=_spread_columns(site, pairs, slots, blocks, most),
        source_of=tuple(representatives),
    )


def _side_by_side(site: HeadSite, blocks: Sequence[Sequence[int]], most: int) -> Part:
    """Value heads of `most` old ones each, zeros where there are fewer."""
    value = site.sides["value"]
    weight, bias = value.weight(site.program), value.bias(site.program)
    shape = (len(blocks), most, *weight.shape[1:])
    wide = weight.new_zeros(shape)
    offset = None if bias is None else bias.new_zeros(shape[:3])
    for number, own in enumerate(blocks):
        wide[number, : len(own)] = weight[list(own)]
        if offset is not None and bias is not None:
            offset[number, : len(own)] = bias[list(own)]
    return Part(wide.flatten(1, 2), None if offset is None else offset.flatten(1, 2))


def _spread_columns(
    site: HeadSite, pairs: dict[tuple[int, int], list[int]], slots: Sequence[Sequence[int]],
    blocks: Sequence[Sequence[int]], most: int,
) -> Tensor:  # fmt: skip
    weight = site.output_weight()
    outs, _, width = weight.shape
    found = []
    for own, values in zip(slots, blocks, strict=True):
        for cluster in own:
            columns = weight.new_zeros(outs, most, width)
            for place, value in enumerate(values):
                if (cluster, value) in pairs:
                    columns[:, place] = weight[:, pairs[cluster, value]].sum(1)
            found.append(columns.flatten(1))
    return torch.stack(found, dim=1)


def pruned(site: HeadSite, kept: Sequence[int]) -> HeadCut:
    """Returns the cut that leaves only the heads `kept` (rising), as they are.

    Key and value heads that none of them reads go, too.

    Raises:
        Unfit: the key heads that are left would have different numbers of query heads.
    """
    heads = list(kept)
    parts: dict[str, Part | None] = {}
    for kind in ("key", "value"):
        side = site.sides[kind]
        read = [side.of_head[head] for head in heads]
        used = sorted(set(read))
        if len({read.count(own) for own in used}) > 1 or read != sorted(read):
            raise Unfit(f"its {kind} heads would have different numbers of query heads")
        parts[kind] = part(site, kind, used) if len(used) < side.heads else None
    return HeadCut(
        query=part(site, "query", _query_heads(site, heads)),
        key=parts["key"],
        value=parts["value"],
        output=site.output_weight()[:, heads],
        source_of=tuple(heads),
    )
