"""Entries of a table of rotary positions that belong to the channels that stay in each head."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx

from redpass import ops
from redpass.analysis.heads.axes import Unfit, new_node
from redpass.analysis.heads.joins import Job
from redpass.plan import Insert, Ref, WeightRef

aten = torch.ops.aten


def entries(job: Job, table: fx.Node, place: int, each: Tensor, heads: int | None) -> str:
    """Returns the node that has some entries of a table, made once an attention.

    Args:
        place: axis of the channels.
        each: `[heads, count]`, which entries; one row where all heads take the same.
        heads: axis that becomes that of heads; -1 for a new one in front, None for no axis.

    Raises:
        Unfit: a table that has no place for heads, or one for each already.
    """
    key = (table.name, place, heads, tuple(map(tuple, each.tolist())))
    if key not in job.tables:
        sizes = table.meta["val"].shape
        if heads is not None and not -1 <= heads < place:
            raise Unfit(f"{table.name} cannot be cut for each head by itself")
        if heads is not None and heads >= 0 and ops.expression(sizes[heads]) != 1:
            raise Unfit(f"{table.name} has places for each head already")
        index = job.places_of(tuple(each.flatten().tolist()))
        made = list(_taken(job, table, place, index, each, heads))
        job.made += made
        job.tables[key] = made[-1].name
    return job.tables[key]


def _taken(
    job: Job, table: fx.Node, place: int, index: WeightRef, each: Tensor, heads: int | None
) -> Iterator[Insert]:
    label = job.site.label.replace(".", "_").replace("-", "_")
    stem = f"{table.name}_{job.what}_{label}_{len(job.tables)}"
    before = _first_reader(job, table)

    def new(what: str, target: Any, *args: Any) -> Insert:
        return Insert(new_node(job.site.program, stem + what), target, args, before)

    yield (found := new("", aten.index_select.default, Ref(table.name), place, index))
    if heads is None:
        return
    yield (found := new("_heads", aten.unflatten.int, Ref(found.name), place, list(each.shape)))
    if heads < 0:
        yield (found := new("_first", aten.unsqueeze.default, Ref(found.name), 0))
        place, heads = place + 1, 0
    yield (found := new("_turned", aten.transpose.int, Ref(found.name), heads, place))
    yield new("_only", aten.squeeze.dim, Ref(found.name), place)


def _first_reader(job: Job, table: fx.Node) -> str:
    """Queries and keys may share the entries, so they stand before both."""
    known = [job.site.sides[kind].operand.known for kind in ("query", "key")]
    inside = [user for user in table.users if any(user in nodes for nodes in known)]
    return min(inside, key=job.site.flow.order.__getitem__).name
