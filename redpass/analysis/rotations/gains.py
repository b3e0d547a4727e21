"""Gains and biases of a norm on the stream: where they are read, and whether they can move."""

from __future__ import annotations

from collections.abc import Sequence, Set

from torch import fx

from redpass import ops
from redpass.analysis.records import Norm
from redpass.analysis.rotations.records import Unit
from redpass.analysis.rotations.roles import Roles


def units(
    roles: Roles, norm: Norm, members: Sequence[fx.Node], turned: Set[fx.Node]
) -> tuple[list[Unit], str]:
    """Returns what its gain and bias become, and why the norm cannot be turned, or "".

    Args:
        members: the nodes it is made of, without those that are values of the stream.
        turned: values that are turned.
    """
    found: list[Unit] = []
    for node in members:
        if node.name != norm.output and not _is_private(node, norm):
            return [], f"{node.name}, a part of a norm, is read elsewhere too"
        if ops.is_call(node, "mean", "var") and not _is_over_last(node):
            return [], f"{node.name}, a part of a norm, is not over the features alone"
        for operand in node.all_input_nodes:
            inside = operand in turned or operand.name in norm.nodes
            if inside or roles.axis(operand) is None:
                continue
            unit = _unit(node, operand, norm)
            if unit is None:
                return [], f"{operand.name}, the gain or bias of a norm, is not understood"
            found.append(unit)
    known = {norm.weight, norm.bias} - {None}
    if {unit.weight for unit in found} != known:
        return [], f"the gain and bias of {norm.output} are not understood"
    return found, _sized(members, roles)


def _sized(members: Sequence[fx.Node], roles: Roles) -> str:
    """Why a fused norm is not one over the stream's width, or ""."""
    for node in members:
        if ops.is_call(node, "layer_norm", "rms_norm"):
            sizes = list(ops.argument(node, "normalized_shape"))
            if sizes != [roles.dimension.size]:
                return f"{node.name} is a norm over {sizes}"
    return ""


def _is_private(node: fx.Node, norm: Norm) -> bool:
    return all(user.name in norm.nodes or ops.is_size(user) for user in node.users)


def _is_over_last(node: fx.Node) -> bool:
    dims = node.args[1] if len(node.args) > 1 else None
    last = node.all_input_nodes[0].meta["val"].dim() - 1
    return isinstance(dims, list | tuple) and [d % (last + 1) for d in dims] == [last]  # type: ignore[operator]


def _unit(node: fx.Node, operand: fx.Node, norm: Norm) -> Unit | None:
    """What a static operand becomes: its weight, through casts and the offset of a gain."""
    reader, offset = node, 0.0
    while operand.op != "get_attr":
        if len(operand.users) != 1:
            return None
        if ops.is_call(operand, "add"):
            numbers = [a for a in operand.args if isinstance(a, int | float)]
            offset += float(sum(numbers))
            if len(numbers) != 1 or operand.kwargs:
                return None
        elif not ops.is_call(operand, *ops.CASTS, *ops.COPIES):
            return None
        reader, operand = operand, operand.all_input_nodes[0]
    weight = str(operand.target)
    if weight == norm.bias:
        return Unit(reader.name, weight, 0.0) if not offset else None
    is_gain = weight == norm.weight and offset == norm.offset
    return Unit(reader.name, weight, 1.0 - offset) if is_gain else None
