"""`cost`: parameters, bytes, FLOPs and cache bytes of a program and of each of its branches.

FLOPs count matrix products, convolutions and attention, two for each multiply-add, as a formula
over the named dimensions; elementwise work is not counted (the field's convention).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import sympy
import torch
from torch import Tensor, fx

from redpass import ops
from redpass.analysis.flops import node_flops
from redpass.analysis.records import Branch, StatePair
from redpass.analysis.structure import structure
from redpass.program import Program, Shape
from redpass.verify.sizes import parse_size

if TYPE_CHECKING:
    from redpass.facts import Facts


ANGLE_STEPS = 64
"""How far a weight is followed to see whether it is a table of angles."""

FAR = 1 << 30
"""A size of a dimension at which a state that is bounded has reached its bound."""


@dataclass(frozen=True)
class Cost:
    """What a program, or one branch of it, costs.

    Attributes:
        parameters: trained numbers, each storage counted once.
        buffers: other stored numbers: running statistics, tables, masks.
        bytes: bytes of both.
        kv_bytes_per_token: bytes of state that one more cached position of one sequence needs.
        state_bytes: bytes of state of one sequence that do not grow with its length.
        by_branch: branch label -> its own cost; weights shared with others count in each.
        operations: (node, FLOPs as an expression over dimension names).
        smallest: dimension name -> its smallest size, used where `flops` gets none.
    """

    parameters: int
    buffers: int
    bytes: int
    kv_bytes_per_token: int = 0
    state_bytes: int = 0
    by_branch: Mapping[str, Cost] = field(default_factory=dict)
    operations: tuple[tuple[str, Any], ...] = ()
    smallest: Mapping[str, int] = field(default_factory=dict)

    def flops(self, sizes: Mapping[str, int]) -> int:
        """FLOPs of one call with dimension name -> size; names not given take their smallest."""
        total: dict[Any, int] = {}
        for _, flops in self.operations:
            total[flops] = total.get(flops, 0) + 1
        return sum(count * self._value(flops, sizes) for flops, count in total.items())

    def flops_of(self, node: str, sizes: Mapping[str, int]) -> int:
        """FLOPs of one node; 0 for one that is not counted."""
        return sum(self._value(flops, sizes) for name, flops in self.operations if name == node)

    def _value(self, flops: Any, sizes: Mapping[str, int]) -> int:
        if not isinstance(flops, sympy.Expr):
            return int(flops)
        known = dict(self.smallest) | dict(sizes)
        return int(flops.subs({s: known.get(s.name, 1) for s in flops.free_symbols}))


def cost(program: Program, facts: Facts | None = None) -> Cost:
    """Counts `program`. Linear in the graph; weights are looked at by shape only."""
    found = structure(program) if facts is None else facts.get(structure)
    whole = total_cost(program)
    operations, smallest = dict(whole.operations), whole.smallest
    branches = {b.label: _branch(program, b, operations, smallest) for b in found.branches}
    return _with_branches(whole, branches)


def total_cost(program: Program) -> Cost:
    """Counts `program` as a whole, without finding its branches: for costs of many candidates."""
    counted = [(node.name, node_flops(node)) for node in program.graph.nodes]
    operations = {name: flops for name, flops in counted if flops is not None}
    smallest = {name: low for name, (low, _) in program.signature.dims.items()}
    names = {str(node.target) for node in program.weight_nodes}
    return _of(program, names, operations, program.signature.state, smallest)


def _branch(
    program: Program, branch: Branch, operations: Mapping[str, Any], smallest: Mapping[str, int]
) -> Cost:
    inside = {n: operations[n] for n in sorted(branch.path | branch.nodes) if n in operations}
    return _of(program, branch.weights, inside, branch.state, smallest)


def _of(
    program: Program,
    weights: Iterable[str],
    operations: Mapping[str, Any],
    state: Iterable[StatePair],
    smallest: Mapping[str, int],
) -> Cost:
    parameters = buffers = size = 0
    for tensor, trained in storages(program, weights):
        parameters += tensor.numel() * trained
        buffers += tensor.numel() * (not trained)
        size += tensor.numel() * tensor.element_size()
    growing, fixed = _state_bytes(program, state)
    pairs = tuple(operations.items())
    empty: Mapping[str, Cost] = MappingProxyType({})
    return Cost(parameters, buffers, size, growing, fixed, empty, pairs, smallest)


def _with_branches(whole: Cost, branches: dict[str, Cost]) -> Cost:
    return Cost(
        whole.parameters, whole.buffers, whole.bytes, whole.kv_bytes_per_token, whole.state_bytes,
        MappingProxyType(branches), whole.operations, whole.smallest,
    )  # fmt: skip


def storages(program: Program, names: Iterable[str]) -> list[tuple[Tensor, bool]]:
    """The weights with each storage once, and whether it is trained."""
    found: dict[Any, tuple[Tensor, bool]] = {}
    tables = _angles(program)
    for name in names:
        tensor = program.weights[name]
        key = name if tensor.is_meta else (tensor.untyped_storage().data_ptr(), tensor.numel())
        trained = name not in tables and is_trained(name, tensor)
        if key not in found or trained:
            found[key] = (tensor, trained)
    return list(found.values())


def _angles(program: Program) -> frozenset[str]:
    """Weights that only make angles: every way on ends in a cosine or sine (rotary tables)."""
    return frozenset(
        str(node.target)
        for node in program.weight_nodes
        if node.meta["val"].dim() <= 2 and node.users and _leads_to_angles(node)
    )


def _leads_to_angles(node: fx.Node) -> bool:
    todo, seen = list(node.users), 0
    while todo:
        user = todo.pop()
        seen += 1
        if ops.is_call(user, "cos", "sin"):
            continue
        moves = ops.is_view(user) or ops.is_call(user, "to", "_to_copy", "mul", "matmul", "cat")
        if not moves or seen > ANGLE_STEPS or not user.users:
            return False
        todo += list(user.users)
    return True


def is_trained(name: str, tensor: Tensor) -> bool:
    """Whether a weight holds trained numbers: a parameter, or made from parameters by a pass."""
    if isinstance(tensor, torch.nn.Parameter):
        return True
    last = name.rsplit(".", 1)[-1]
    statistic = last in ("running_mean", "running_var", "num_batches_tracked")
    return tensor.is_floating_point() and tensor.dim() > 0 and not statistic


def _state_bytes(program: Program, state: Iterable[StatePair]) -> tuple[int, int]:
    """Bytes of state of one sequence: (for one more cached position, not growing)."""
    growing = fixed = 0
    for name, output in state:
        port = program.signature.input(name)
        after = program.signature.output(output)
        element = torch.empty((), dtype=port.dtype).element_size()
        before, then = _far(port.shape), _far(after.shape)
        kept = [size for size in port.shape if isinstance(size, int)]
        if before != then:
            growing += math.prod(kept) * element
        else:
            full = [int(b) for b, s in zip(before, port.shape, strict=True) if "Min(" in str(s)]
            fixed += math.prod([*kept, *full]) * element
    return growing, fixed


def _far(shape: Shape) -> list[Any]:
    """Sizes where all dimensions are long, so that those with a bound have reached it."""
    return [_far_size(size) if isinstance(size, str) else size for size in shape]


@lru_cache(maxsize=4096)
def _far_size(text: str) -> Any:
    size = parse_size(text)
    return size.subs(dict.fromkeys(size.free_symbols, FAR))
