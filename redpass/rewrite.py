"""Applies actions to a program: the one place where graphs change.

`apply` copies the graph, edits the copy, gives new nodes their fake values, removes what became
dead, and returns a new `Program`. The program it was given is untouched; weights are shared.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import sympy
import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensorMode

from redpass import ops
from redpass.errors import PassError
from redpass.plan import (
    Action,
    DropState,
    Edit,
    Erase,
    Insert,
    Literal,
    Ref,
    Replace,
    SetArgument,
    SetWeight,
    WeightRef,
)
from redpass.program import Program, Signature, copy_graph, output_node


def apply(program: Program, actions: Iterable[Action]) -> Program:
    """Returns a new program with `actions` done, in order.

    Values replaced by an earlier action are followed by later ones, so actions planned on the
    same program compose.

    Raises:
        PassError: an edit names a node or weight that does not exist, or is not well formed.
    """
    todo = tuple(actions)
    if not todo:
        return program
    draft = _Draft(program)
    for action in todo:
        draft.inserted.clear()
        for edit in action.edits:
            draft.do(edit, action)
    return draft.finish()


@dataclass
class _Draft:
    program: Program
    graph: fx.Graph = field(init=False)
    nodes: dict[str, fx.Node] = field(init=False)
    weights: dict[str, Tensor] = field(init=False)
    signature: Signature = field(init=False)
    moved: dict[fx.Node, fx.Node] = field(default_factory=dict)
    inserted: set[fx.Node] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.graph, _ = copy_graph(self.program.graph)
        self.nodes = {node.name: node for node in self.graph.nodes}
        self.weights = dict(self.program.weights)
        self.signature = self.program.signature
        self.readers: dict[str, fx.Node] = {
            str(n.target): n for n in self.graph.nodes if n.op == "get_attr"
        }
        inputs = [node for node in self.graph.nodes if node.op == "placeholder"]
        self.inputs = dict(zip([p.name for p in self.signature.inputs], inputs, strict=True))
        self.mode = fake_mode(self.program)

    def do(self, edit: Edit, action: Action) -> None:
        """Does one edit; a failure names the action."""
        try:
            getattr(self, f"_{type(edit).__name__}")(edit)
        except PassError:
            raise
        except Exception as error:
            raise PassError(f"{type(edit).__name__} failed: {error}", place=action.key) from error

    def finish(self) -> Program:
        drop_dead(self.graph)
        kept = {str(node.target) for node in self.graph.nodes if node.op == "get_attr"}
        weights = {name: tensor for name, tensor in self.weights.items() if name in kept}
        return replace(self.program, graph=self.graph, weights=weights, signature=self.signature)

    def _find(self, name: str) -> fx.Node:
        if name not in self.nodes:
            raise PassError("an edit names a node that does not exist", place=name)
        node: fx.Node = self.nodes[name]
        while node in self.moved:
            node = self.moved[node]
        return node

    def _Insert(self, edit: Insert) -> None:
        with self.graph.inserting_before(self.nodes[edit.before]):
            args = fx.node.map_aggregate(edit.args, self._resolve)
            kwargs = fx.node.map_aggregate(dict(edit.kwargs), self._resolve)
            node = self.graph.create_node("call_function", edit.target, args, kwargs, edit.name)
        near = self.nodes[edit.before].meta
        node.meta = {k: near[k] for k in ("nn_module_stack", "stack_trace") if k in near}
        node.meta["val"] = fake_call(self.mode, node)
        self.nodes[edit.name] = node
        self.inserted.add(node)

    def _Replace(self, edit: Replace) -> None:
        old = self._find(edit.old)
        if isinstance(edit.new, Literal):
            set_literal(old, edit.new.value)
        elif (new := self._operand(edit.new)) is not old:
            # Nodes this action inserted may compute the new value from the old one: they keep it.
            old.replace_all_uses_with(new, delete_user_cb=lambda user: user not in self.inserted)
            self.moved[old] = new

    def _Erase(self, edit: Erase) -> None:
        node = self.nodes.pop(edit.node)
        if node.users:
            raise PassError("a node that is read cannot be erased", place=edit.node)
        self.graph.erase_node(node)

    def _SetArgument(self, edit: SetArgument) -> None:
        node = self.nodes[edit.node]
        node.replace_input_with(self._find(edit.old), self._operand(edit.new))

    def _SetWeight(self, edit: SetWeight) -> None:
        if edit.name in self.weights:
            raise PassError("a new weight would hide one that exists", place=edit.name)
        self.weights[edit.name] = edit.value.detach()

    def _DropState(self, edit: DropState) -> None:
        ports = self.signature
        keep = [i for i, port in enumerate(ports.outputs) if port.name != edit.output]
        out = output_node(self.graph)
        values: Any = out.args[0]
        out.args = (tuple(values[i] for i in keep),)
        resource_sizes(self.graph, self.inputs[edit.input])
        self.signature = replace(
            ports,
            inputs=tuple(port for port in ports.inputs if port.name != edit.input),
            outputs=tuple(ports.outputs[i] for i in keep),
            state=tuple(pair for pair in ports.state if pair != (edit.input, edit.output)),
        )
        self.inputs[edit.input].meta["dropped"] = True

    def _operand(self, new: str | WeightRef) -> fx.Node:
        return self._read(new.name) if isinstance(new, WeightRef) else self._find(new)

    def _resolve(self, value: Any) -> Any:
        if isinstance(value, Ref):
            return self._find(value.name)
        return self._read(value.name) if isinstance(value, WeightRef) else value

    def _read(self, name: str) -> fx.Node:
        if name not in self.weights:
            raise PassError("an edit names a weight that does not exist", place=name)
        if name not in self.readers:
            first = next(iter(self.graph.nodes))
            with self.graph.inserting_before(first):
                node = self.graph.create_node("get_attr", name, name=name.replace(".", "_"))
            node.meta["val"] = fake_tensor(self.mode, self.weights[name])
            self.readers[name] = node
        return self.readers[name]


def fake_mode(program: Program) -> FakeTensorMode:
    """Returns the mode the program's fake values belong to."""
    for node in program.graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, torch._subclasses.FakeTensor):
            return value.fake_mode
    return FakeTensorMode(allow_non_fake_inputs=True)


def fake_tensor(mode: FakeTensorMode, tensor: Tensor) -> Tensor:
    """Returns a fake tensor with the shape, dtype and strides of `tensor`, on the CPU."""
    with mode:
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)


def fake_call(
    mode: FakeTensorMode, node: fx.Node, instead: Mapping[fx.Node, Any] | None = None
) -> Any:
    """Returns what calling `node` gives on fake values. Raises whatever the op raises.

    Args:
        instead: values to take in place of the ones the operands carry.
    """
    known = instead or {}
    args = fx.node.map_arg(node.args, lambda n: known[n] if n in known else n.meta["val"])
    kwargs = fx.node.map_arg(node.kwargs, lambda n: known[n] if n in known else n.meta["val"])
    # A few kernels refuse symbolic sizes; their decompositions take them. For the one that is
    # known to, nothing else is tried: torch logs the failure at length.
    if not ops.is_call(node, "baddbmm"):
        with contextlib.suppress(RuntimeError), mode:
            return node.target(*args, **kwargs)  # type: ignore[operator]
    with enable_python_dispatcher(), mode:
        return node.target(*args, **kwargs)  # type: ignore[operator]


def set_literal(old: fx.Node, value: float) -> None:
    """Writes `value` into the arguments of every reader of `old`."""
    for reader in list(old.users):
        reader.args = fx.node.map_arg(reader.args, lambda node: value if node is old else node)
        reader.kwargs = fx.node.map_arg(reader.kwargs, lambda node: value if node is old else node)


def drop_dead(graph: fx.Graph) -> int:
    """Erases pure nodes nobody reads, and inputs marked as dropped. Returns how many."""
    count = 0
    for node in reversed(list(graph.nodes)):
        dead = not node.users and (ops.is_pure(node) or node.meta.get("dropped", False))
        if dead:
            graph.erase_node(node)
            count += 1
    return count


def size_expression(node: fx.Node) -> sympy.Expr | None:
    """Returns the expression of a symbolic size node, an integer as a constant, else None."""
    value = node.meta.get("val")
    if isinstance(value, torch.SymInt):
        return value.node.expr
    return sympy.Integer(value) if isinstance(value, int) else None


def resource_sizes(graph: fx.Graph, source: fx.Node) -> None:
    """Lets every size read off `source` be read off other inputs, or a difference of two.

    A cache entry can be dropped only when no size comes from it alone.

    Raises:
        PassError: a size that no other inputs give.
    """
    sizes = [user for user in source.users if ops.is_call(user, "sym_size")]
    for size in sizes:
        wanted = size_expression(size)
        with graph.inserting_before(_after_inputs(graph)):
            new = _find_size(graph, source, wanted)
            if new is None:
                raise PassError(f"no other input gives the size {wanted}", place=source.name)
        new.meta["val"] = size.meta["val"]
        size.replace_all_uses_with(new)
        graph.erase_node(size)


def _find_size(graph: fx.Graph, source: fx.Node, wanted: Any) -> fx.Node | None:
    sizes = [
        (node, axis, size.node.expr)
        for node in graph.nodes
        if node.op == "placeholder" and node is not source and not node.meta.get("dropped")
        for axis, size in enumerate(getattr(node.meta["val"], "shape", ()))
        if isinstance(size, torch.SymInt)
    ]
    for node, axis, expression in sizes:
        if expression == wanted:
            return graph.call_function(torch.ops.aten.sym_size.int, (node, axis))
    for node, axis, expression in sizes:
        for other, other_axis, subtracted in sizes:
            if sympy.simplify(expression - subtracted - wanted) == 0:
                return _difference(graph, (node, axis), (other, other_axis))
    return None


def _difference(graph: fx.Graph, left: tuple[fx.Node, int], right: tuple[fx.Node, int]) -> fx.Node:
    nodes = []
    for node, axis in (left, right):
        size = graph.call_function(torch.ops.aten.sym_size.int, (node, axis))
        size.meta["val"] = node.meta["val"].shape[axis]
        nodes.append(size)
    return graph.call_function(operator.sub, tuple(nodes))


def _after_inputs(graph: fx.Graph) -> fx.Node:
    last: fx.Node = [node for node in graph.nodes if node.op == "placeholder"][-1]
    return last.next
