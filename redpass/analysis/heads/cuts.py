"""Edits that give an attention other heads: fewer, of another width, shared, or with a wider value.

    q = linear(x, w_q)                  q = linear(x, w_q')
    q4 = transpose(view(q, 4 heads))    q3 = transpose(view(q, 3 heads))
    k4 = cat(past 4 heads, ...)    ->   k2 = cat(past 2 heads, ...)
    y = sdpa(q4, k4, v4)                y = sdpa(q3, index_select(k2, 1, [0, 0, 1]), v3)
    linear(merge(y), w_o)               linear(merge(y), w_o')

`HeadCut` says what heads there are from now on, as matrices; which of them each head of the core
reads may repeat them. `edits` writes it into the graph: the linears keep their place with other
weights, views get new sizes, the cache shrinks, and a mask with a place for each head follows.
Every op between projections and core is looked at (`head_forms`): a norm over all heads, a gate or
a weight with a place for each head makes it `Unfit`, and nothing is changed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import fx

from redpass import ops
from redpass.analysis.heads.axes import (
    Factor,
    Unfit,
    is_equal,
    named,
    new_node,
    old_size,
    plain_form,
)
from redpass.analysis.heads.joins import HeadCut, Job, Part, join, spread
from redpass.analysis.heads.regions import pick_channels
from redpass.analysis.heads.sites import KINDS, HeadSite
from redpass.analysis.heads.weights import Weights
from redpass.plan import (
    Edit,
    Insert,
    Ref,
    ResizeState,
    SetArgument,
    SetCall,
    SetWeight,
    WeightRef,
)

__all__ = ["HeadCut", "Part", "Unfit", "edits", "part", "spread"]

aten = torch.ops.aten


def part(site: HeadSite, kind: str, heads: Sequence[int]) -> Part:
    """Returns some of the heads that there are, in the order given."""
    side, chosen = site.sides[kind], list(heads)
    bias = side.bias(site.program)
    return Part(side.weight(site.program)[chosen], None if bias is None else bias[chosen])


def edits(site: HeadSite, cut: HeadCut, what: str) -> tuple[Edit, ...]:
    """Returns the edits that give `site` the heads of `cut`.

    Args:
        what: ends the names of new weights and nodes.

    Raises:
        Unfit: why this attention cannot have them.
    """
    job = Job(site, cut, what)
    weights = Weights(site, job.parts, what, job.forms)
    job.made += weights.edits()
    job.skipped |= weights.skipped
    for kind in KINDS:
        if kind in weights.splits:
            _seed(job, kind, *weights.splits[kind])
        changed = job.parts[kind]
        if cut.planes is not None and changed is not None and changed.kept is not None:
            pick_channels(job, site.sides[kind], cut.planes, weights.splits[kind][0])
        join(job, site.sides[kind])
    _follow_masks(job)
    core = site.core
    job.forms.run(core.nodes | {core.output})
    _call_core(job)
    source = site.program.nodes[site.output.input]
    job.forms.run(site.flow.between(core.output, source))
    _check_readers(job, source)
    job.made += _output(job, source)
    return tuple(sorted([*job.made, *job.forms.edits], key=_turn))


def _seed(job: Job, kind: str, node: fx.Node, heads: int, channels: int) -> None:
    """The form of the first value with an axis for heads, where its linear is another one."""
    form: list[Any] = list(plain_form(node))
    side = job.site.sides[kind]
    if job.parts[kind] is not None:
        form[heads] = (job.factor(side),)
        if job.width(kind) != side.width:
            name = "values' width" if kind == "value" else "width"
            form[channels] = (Factor(name, side.width, job.width(kind)),)
    job.forms.known[node] = tuple(form)


def _follow_masks(job: Job) -> None:
    """Masks with a place for each head follow their heads."""
    core, of = job.site.core, job.cut.source_of
    for mask in core.masks:
        form = plain_form(mask)
        count = form[-3][0] if len(form) > 2 else 1
        if count == 1 or not (of or job.heads.new != job.heads.old):
            continue
        if count != job.heads.old or len(of) != job.heads.new:
            raise Unfit(f"its mask {mask.name} is not one for all heads, nor one for each")
        index = job.index("mask_of", of)
        place = job.site.label.replace(".", "_").replace("-", "_")
        name = new_node(job.site.program, f"{mask.name}_{job.what}_{place}")
        readers = [user for user in mask.users if user in core.nodes]
        before = min(readers, key=job.site.flow.order.__getitem__).name
        call: Any = aten.index_select.default
        job.made.append(Insert(name, call, (Ref(mask.name), len(form) - 3, index), before))
        job.made += [SetArgument(user.name, mask.name, name) for user in readers]
        job.forms.known[mask] = (*form[:-3], (job.heads,), *form[-2:])


def _call_core(job: Job) -> None:
    """A fused core says its scale once the width of its heads is another one."""
    core, width = job.site.core, job.width("query")
    if not core.is_fused:
        return
    changes: dict[str, Any] = {}
    if width != job.width("key"):
        raise Unfit(f"queries of width {width}, keys of width {job.width('key')}")
    if width != job.site.attention.head_dim and core.factor is not None:
        changes["scale"] = core.factor
    if ops.is_call(core.node, "scaled_dot_product_attention"):
        if ops.argument(core.node, "enable_gqa") and not job.is_grouped():
            changes["enable_gqa"] = False
    elif changes or job.heads.new != job.heads.old:
        raise Unfit(f"{ops.base_name(core.node)} is not written with other heads")
    if changes:
        kwargs = named(dict(core.node.kwargs))
        job.made.append(SetCall(core.node.name, None, {**kwargs, **changes}))


def _check_readers(job: Job, source: fx.Node) -> None:
    """Values whose heads change must be read by what was followed only."""
    caches = (job.site.attention.key_cache, job.site.attention.value_cache)
    public = {job.site.program.output_value(pair[1]) for pair in caches if pair is not None}
    for node in job.forms.known:
        if node in job.site.core.masks:
            continue
        for user in node.users:
            followed = user in job.forms.known or user in job.skipped or ops.is_size(user)
            is_end = node is source and user.name == job.site.output.node
            if not followed and not is_end and not (user.op == "output" and node in public):
                raise Unfit(f"{user.name} reads its heads beside the attention")


def _output(job: Job, source: fx.Node) -> Iterator[Edit]:
    """The output projection's new columns, in the order in which it reads the heads."""
    site, new = job.site, job.cut.output
    if source in job.forms.known:
        _check_order(job, source)
    if new is None:
        if job.heads.new != job.heads.old:
            raise Unfit("another number of heads needs another output projection")
        return
    matrix = new.flatten(1)
    if source not in job.forms.known:
        matrix = torch.empty_like(matrix)
        matrix[:, site.columns.flatten()] = new.flatten(1)
    yield from Weights.swap(site, site.output, matrix, job.cut.output_bias, job.what)


def _check_order(job: Job, source: fx.Node) -> None:
    """What the output projection reads is head after head, each with its channels in order."""
    last = job.forms.of(source)[-1]
    expected = torch.arange(job.site.columns.numel()).reshape(job.site.columns.shape)
    is_first = is_equal(old_size(last[:1]), job.heads.old)
    if not is_first or not torch.equal(job.site.columns, expected):
        raise Unfit("the output projection does not read the heads one after the other")


def _turn(edit: Edit) -> int:
    if isinstance(edit, SetArgument):
        return 1 if isinstance(edit.new, WeightRef) else 5
    return {SetWeight: 0, ResizeState: 2, Insert: 3}.get(type(edit), 4)
