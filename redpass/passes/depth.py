"""What the passes over layers and branches share: their edits, their savings, their names.

Not a pass itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from redpass.analysis import cost
from redpass.analysis.blocks import Block
from redpass.analysis.cost import storages
from redpass.analysis.inspection import DEFAULT_SIZES
from redpass.analysis.structure import Branch
from redpass.analysis.twins import Twin
from redpass.errors import UsageError, nearest
from redpass.facts import Facts
from redpass.plan import Bypass, DropState, DropTerm, Edit, SetArgument, WeightRef
from redpass.program import Program

NO_STREAM = "no residual stream with branches was found"
NO_LAYERS = "no layer repeats: there are fewer than two on one residual stream"


def drop_branch(branch: Branch) -> tuple[Edit, ...]:
    """Returns the edits that take a branch out of its sum, and its state out of the ports."""
    return (DropTerm(branch.join, branch.exit), *(DropState(*pair) for pair in branch.state))


def drop_block(block: Block) -> tuple[Edit, ...]:
    """Returns the edits that let the stream go past whole layers, norms and all."""
    state = [DropState(*pair) for branch in block.branches for pair in branch.state]
    inside = dict.fromkeys(branch.after for branch in block.branches)
    inside.pop(block.after, None)
    return (Bypass(block.after, block.entry, tuple(inside)), *state)


def saving(facts: Facts, branches: Iterable[Branch]) -> dict[str, float]:
    """Returns what the program no longer costs without `branches`; shared weights stay."""
    program, gone = facts.program, list(branches)
    own = frozenset[str]().union(*(branch.nodes for branch in gone))
    lost = {str(node.target) for node in program.weight_nodes if node.name in own}
    before, after = (
        sum_weights(program, names) for names in (program.weights, set(program.weights) - lost)
    )
    costs = [facts.get(cost).by_branch[branch.label] for branch in gone]
    return {
        "parameters": before[0] - after[0],
        "bytes": before[1] - after[1],
        "flops": sum(each.flops(DEFAULT_SIZES) for each in costs),
        "kv_bytes_per_token": sum(each.kv_bytes_per_token for each in costs),
    }


def borrow_weights(twin: Twin) -> tuple[Edit, ...]:
    """Returns the edits that let a layer read the weights that stand in its places in another."""
    return tuple(
        SetArgument(place.reader, place.node, WeightRef(weight))
        for place, weight in twin.pairs
        if place.weight != weight
    )


def saving_of_weights(program: Program, twin: Twin) -> dict[str, float]:
    """Returns what the weights cost that only the layer read before it borrowed others."""
    readers = {place.reader for place, weight in twin.pairs if place.weight != weight}
    gone = {place.weight for place, weight in twin.pairs if place.weight != weight}
    lost = {
        str(node.target)
        for node in program.weight_nodes
        if str(node.target) in gone and {user.name for user in node.users} <= readers
    }
    before, after = (
        sum_weights(program, names) for names in (program.weights, set(program.weights) - lost)
    )
    return {"parameters": before[0] - after[0], "bytes": before[1] - after[1]}


def sum_weights(program: Program, names: Iterable[str]) -> tuple[int, int]:
    """Returns how many trained numbers and how many bytes the named weights hold."""
    found = storages(program, names)
    parameters = sum(tensor.numel() for tensor, trained in found if trained)
    return parameters, sum(tensor.numel() * tensor.element_size() for tensor, _ in found)


def named(only: Sequence[str], blocks: Sequence[Block], place: str) -> tuple[Block, ...]:
    """Returns the blocks that the user named, in the user's order.

    Raises:
        UsageError: a name no block has.
    """
    known = {block.label: block for block in blocks}
    for label in only:
        if label not in known:
            hint = nearest(label, known)
            raise UsageError(f"no layer is called '{label}'", place=place, hint=hint)
    return tuple(known[label] for label in dict.fromkeys(only))


def check_some_stay(only: Sequence[str], layers: Sequence[Block], place: str) -> None:
    """Raises `UsageError` when `only` names all layers of a stream."""
    for stream in {layer.stream for layer in layers}:
        labels = {layer.label for layer in layers if layer.stream == stream}
        if labels <= set(only):
            hint = f"leave at least one of {', '.join(sorted(labels))}"
            raise UsageError(f"all {len(labels)} layers are asked away", place=place, hint=hint)
