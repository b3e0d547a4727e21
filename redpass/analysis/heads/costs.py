"""What an attention with other heads saves, by sizes alone."""

from __future__ import annotations

from collections.abc import Iterable

from redpass.analysis import cost
from redpass.analysis.heads.cuts import HeadCut
from redpass.analysis.heads.sites import KINDS, HeadSite
from redpass.analysis.inspection import DEFAULT_SIZES
from redpass.facts import Facts
from redpass.plan import Edit, SetWeight


def saved(site: HeadSite, cut: HeadCut, edits: Iterable[Edit], facts: Facts) -> dict[str, float]:
    """Returns the change by name of the cost: weights, FLOPs at the usual sizes, cache bytes."""
    found = dict.fromkeys(("parameters", "bytes", "flops", "kv_bytes_per_token"), 0.0)
    costs, program = facts.get(cost), site.program
    caches = {"key": site.attention.key_cache, "value": site.attention.value_cache}
    for kind in KINDS:
        side, new = site.sides[kind], getattr(cut, kind)
        if new is None:
            continue
        features = side.heads * side.width - new.weight.shape[0] * new.weight.shape[1]
        _less(found, features * side.linear.ins, program.weights[side.linear.weight].itemsize)
        if side.projection.bias is not None:
            _less(found, features, program.weights[side.projection.bias].itemsize)
        whole = costs.flops_of(side.linear.node, DEFAULT_SIZES)
        found["flops"] += whole * features / side.linear.outs
        pair = caches.get(kind)
        if pair is not None:
            value = program.input_node(pair[0]).meta["val"]
            found["kv_bytes_per_token"] += features * value.element_size()
    if cut.output is not None:
        columns = site.columns.numel() - cut.output.shape[1] * cut.output.shape[2]
        _less(found, columns * site.output.outs, program.weights[site.output.weight].itemsize)
        whole = costs.flops_of(site.output.node, DEFAULT_SIZES)
        found["flops"] += whole * columns / site.output.ins
    found["flops"] += _core(site, cut, facts)
    places = [edit.value for edit in edits if isinstance(edit, SetWeight)]
    found["bytes"] -= sum(t.nbytes for t in places if not t.is_floating_point())
    return found


def _less(found: dict[str, float], count: int, size: int) -> None:
    found["parameters"] += count
    found["bytes"] += count * size


def _core(site: HeadSite, cut: HeadCut, facts: Facts) -> float:
    """FLOPs of scores and sums, which the heads of the core and their widths share evenly."""
    nodes = {node.name for node in site.core.nodes} | {site.core.output.name}
    whole = sum(facts.get(cost).flops_of(name, DEFAULT_SIZES) for name in nodes)
    widths = {kind: site.sides[kind].width for kind in KINDS}
    heads = len(cut.query_of or cut.source_of) or site.heads
    new = {
        kind: widths[kind] if (p := getattr(cut, kind)) is None else p.weight.shape[1]
        for kind in KINDS
    }
    left = heads * (new["query"] + new["value"])
    return whole * (1 - left / (site.heads * (widths["query"] + widths["value"])))
