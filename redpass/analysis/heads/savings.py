"""What narrower heads save, and which of them go together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from redpass.analysis.cost import Cost
from redpass.analysis.inspection import DEFAULT_SIZES
from redpass.plan import Edit, SetArgument, SetWeight, WeightRef

if TYPE_CHECKING:
    from redpass.analysis.heads.sites import HeadSite

SIDES = {"values": ("value",), "keys": ("query", "key"), "heads": ("query", "key", "value")}
"""Kind of cut -> what it makes narrower."""


def kinds_of(own: Iterable[str], *, parts: bool = False) -> tuple[str, ...]:
    """Returns the kinds of cuts where these may be cut; `heads` is both at once.

    Args:
        parts: take `heads` apart instead.
    """
    found = tuple(own)
    if parts:
        return ("values", "keys") if "heads" in found else found
    return (*found, "heads") if len(found) > 1 else found


def width_of(site: HeadSite, kind: str) -> int:
    """Returns how many channels such heads have; of both the narrower ones."""
    return min(site.sides[side].width for side in SIDES[kind])


def saving(
    cost: Cost, site: HeadSite, kind: str, width: int, edits: Iterable[Edit] = ()
) -> Mapping[str, float]:
    """Returns what the program no longer costs when the heads of a kind have `width` channels.

    Args:
        edits: those of the cut: places of channels and gains of norms take room, too.
    """
    parameters = size = flops = cached = 0.0
    caches = {"key": site.attention.key_cache, "value": site.attention.value_cache}
    for name in SIDES[kind]:
        side = site.sides[name]
        gone, weight = side.width - width, site.program.weights[side.linear.weight]
        lost = side.heads * gone * (side.linear.ins + (side.projection.bias is not None))
        rows = side.heads * gone / side.linear.outs
        flops += rows * cost.flops_of(side.linear.node, DEFAULT_SIZES)
        if name == "value":
            lost += site.output.outs * site.heads * gone
            share = site.heads * gone / site.output.ins
            flops += share * cost.flops_of(site.output.node, DEFAULT_SIZES)
        parameters += lost
        size += lost * weight.element_size()
        pair = caches.get(name)
        if pair is not None:
            state = site.program.signature.input(pair[0])
            cached += side.heads * gone * state.dtype.itemsize
    extra = _extra(site, edits)
    parameters, size = parameters - extra[0], size - extra[1]
    return {
        "parameters": parameters,
        "bytes": size,
        "flops": flops + _core(cost, site, kind, width),
        "kv_bytes_per_token": cached,
    }


def _extra(site: HeadSite, edits: Iterable[Edit]) -> tuple[float, float]:
    """Parameters and bytes that come on top: places of channels, and gains of the heads' norms."""
    made, gained = list(edits), {site.attention.query_norm, site.attention.key_norm}
    values = {edit.name: edit.value for edit in made if isinstance(edit, SetWeight)}
    size: float = sum(v.nbytes for v in values.values() if not v.is_floating_point())
    count = 0.0
    for edit in made:
        if not isinstance(edit, SetArgument) or edit.node not in gained:
            continue
        if isinstance(edit.new, WeightRef):
            new, old = values[edit.new.name], site.program.weight(site.program.nodes[edit.old])
            gone = 0 if old is None else old.numel()
            count += new.numel() - gone
            size += (new.numel() - gone) * new.element_size()
    return count, size


def _core(cost: Cost, site: HeadSite, kind: str, width: int) -> float:
    """The FLOPs of scores and sums grow with both widths alike."""
    nodes = site.core.nodes | {site.core.node, site.core.output}
    whole = sum(cost.flops_of(node.name, DEFAULT_SIZES) for node in nodes)
    keys, values = site.sides["key"].width, site.sides["value"].width
    gone = (keys - width) * (kind != "values") + (values - width) * (kind != "keys")
    return whole * gone / (keys + values)
