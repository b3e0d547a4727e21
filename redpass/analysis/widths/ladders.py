"""Ladders of widths: which counts are candidates, what they are called and what they save."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch

from redpass.analysis import cost
from redpass.analysis.experts import stack_of
from redpass.analysis.inspection import DEFAULT_SIZES
from redpass.analysis.linears import linears
from redpass.analysis.rungs import read_target
from redpass.analysis.widths.cuts import Rung, removal_order, ridge_strengths, rungs
from redpass.analysis.widths.narrowing import Width
from redpass.analysis.widths.places import ChannelPlaces
from redpass.analysis.widths.statistics import View
from redpass.errors import UsageError
from redpass.facts import Facts
from redpass.journal import JSON
from redpass.plan import Action
from redpass.program import Program

KINDS = ("feed-forward", "experts", "channels", "hidden")


def step_of(width: Width, multiple: int) -> int:
    """Returns what counts of units are a multiple of, so that their places are one of `multiple`.

    A unit is a channel, or a group of a grouped convolution with all its channels.
    """
    return multiple // math.gcd(multiple, *(holder.block for holder in width.holders))


def ladder(size: int, shares: Sequence[float], multiple: int) -> list[int]:
    """Returns the widths below `size`, falling: the multiple of `multiple` next to each share."""
    near = {max(1, round(size * share / multiple)) * multiple for share in shares}
    return sorted((count for count in near if count < size), reverse=True)


def named(
    place: str, only: Sequence[str], found: ChannelPlaces, multiple: int
) -> dict[str, list[int]]:
    """Reads `label@count` names: label -> counts, falling.

    Raises:
        UsageError: an unknown label, a width that cannot be cut, or a count that it cannot have.
    """
    wanted: dict[str, set[int]] = defaultdict(set)
    for name in only:
        label, count = read_target(place, name, found.by_label, "width")
        if label in found.obstacles:
            raise UsageError(f"'{label}' cannot be cut: {found.obstacles[label]}", place=place)
        size = found.by_label[label].size
        if not 1 <= count < size:
            hint = f"it has {size} channels: leave 1 to {size - 1}"
            raise UsageError(f"'{name}' leaves {count} channels", place=place, hint=hint)
        step = step_of(found.by_label[label], multiple)
        if count % step:
            hint = f"take {max(step, count - count % step)}, or give multiple=1"
            text = f"'{name}' leaves {count} channels, no multiple of {step}"
            raise UsageError(text, place=place, hint=hint)
        wanted[label].add(count)
    return {label: sorted(counts, reverse=True) for label, counts in wanted.items()}


def made_rungs(
    facts: Facts,
    label: str,
    width: Width,
    found: Sequence[View],
    counts: Sequence[int],
    *,
    refit: bool,
) -> list[Rung]:
    """Returns one rung for each number of units to leave; a resumed run is told their order."""
    least = min(counts)

    def choose() -> JSON:
        order = removal_order(width, found, least, refit=refit)
        return order.tolist(), ridge_strengths(width, found, order, least) if refit else {}

    how = "repaired" if refit else "as it is"
    order, strengths = facts.recall(f"order of {label} down to {least}, {how}", choose)
    return rungs(width, found, torch.tensor(order), counts, strengths)


def saving(facts: Facts, width: Width, count: int) -> dict[str, float]:
    """Returns what the program no longer costs with `count` units of a width left."""
    program = facts.program
    numbers = size = 0
    for name, share in _shares_left(width, program, count).items():
        weight = program.weights[name]
        gone = weight.numel() - round(weight.numel() * share)
        numbers, size = numbers + gone, size + gone * weight.element_size()
    return {
        "parameters": numbers,
        "bytes": size,
        "flops": _flops(facts, width, count),
        "kv_bytes_per_token": 0,
    }


def _shares_left(width: Width, program: Program, count: int) -> dict[str, float]:
    """Weight -> share of it that is left."""
    lost: dict[tuple[str, int], int] = defaultdict(int)
    for holder in width.holders:
        lost[holder.weight, holder.axis] += (width.size - count) * holder.block
    left: dict[str, float] = defaultdict(lambda: 1.0)
    for (name, axis), gone in lost.items():
        left[name] *= 1 - gone / program.weights[name].shape[axis]
    return left


def _flops(facts: Facts, width: Width, count: int) -> float:
    program, table = facts.program, facts.get(linears).by_node
    left, counted = _shares_left(width, program, count), facts.get(cost)
    total = 0.0
    for node in dict.fromkeys([*width.makers, *(reader.node for reader in width.readers)]):
        call = program.nodes[node]
        weight = stack_of(call) or str(call.all_input_nodes[1].target)
        weight = table[node].weight if node in table else weight
        total += counted.flops_of(node, DEFAULT_SIZES) * (1 - left[weight])
    return round(total)


def uniform(actions: Sequence[Action], found: ChannelPlaces) -> tuple[Action, ...]:
    """Joins the actions that leave the same share of widths of one kind and size."""
    groups: Mapping[tuple[str, int, str], list[Action]]
    groups = defaultdict(list)
    for action in actions:
        label, _, count = action.target.rpartition("@")
        groups[found.kinds[label], found.by_label[label].size, count].append(action)
    return tuple(_joined(*key, members) for key, members in groups.items())


def _joined(kind: str, size: int, count: str, members: Sequence[Action]) -> Action:
    total = sum(action.loss or 0.0 for action in members)
    saved = {name: sum(action.saving[name] for action in members) for name in members[0].saving}
    return Action(
        members[0].rule,
        f"{kind}.{size}@{count}",
        tuple(edit for action in members for edit in action.edits),
        f"{count} of {size} channels are left in {len(members)} places: {100 * total:.3g}% of "
        "what they are added to is off, summed over places",
        {"error": total, "places": float(len(members))},
        saved,
        total,
        f"{kind}.{size}/width",
    )
