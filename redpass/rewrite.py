"""Applies actions to a program: the one place where graphs change.

`apply` copies the graph, edits the copy, gives new nodes their fake values, removes what became
dead, and returns a new `Program`. The program it was given is untouched; weights are shared.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, fx

from redpass import ops
from redpass.cuts import Cuts, shrink_sizes
from redpass.errors import PassError
from redpass.fake import Sizes, fake_mode, fake_tensor, is_same_size
from redpass.plan import (
    Action,
    AddState,
    Bypass,
    DropState,
    DropTerm,
    Edit,
    Erase,
    Insert,
    Literal,
    Multiply,
    Narrow,
    Once,
    Ref,
    Replace,
    ResizeState,
    SetArgument,
    SetCall,
    SetWeight,
    ShrinkSizes,
    WeightRef,
)
from redpass.program import Program, copy_graph
from redpass.state import States


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
    moved: dict[fx.Node, fx.Node] = field(default_factory=dict)
    without: dict[fx.Node, set[int]] = field(default_factory=dict)
    bypasses: list[Bypass] = field(default_factory=list)
    inserted: set[fx.Node] = field(default_factory=set)
    done: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.graph, _ = copy_graph(self.program.graph)
        self.nodes = {node.name: node for node in self.graph.nodes}
        self.weights = dict(self.program.weights)
        self.readers: dict[str, fx.Node] = {
            str(n.target): n for n in self.graph.nodes if n.op == "get_attr"
        }
        self.mode = fake_mode(self.program)
        self.sizes = Sizes(self.mode)
        self.states = States(self.graph, self.program.signature, self.sizes)
        self.cuts = Cuts(self.weights)

    def do(self, edit: Edit, action: Action) -> None:
        """Does one edit; a failure names the action."""
        try:
            getattr(self, f"_{type(edit).__name__}")(edit)
        except PassError:
            raise
        except Exception as error:
            raise PassError(f"{type(edit).__name__} failed: {error}", place=action.key) from error

    def finish(self) -> Program:
        self._bypass()
        self.states.finish(self._find)
        if self.without:
            drop_dead(self.graph)  # a sum that nobody reads any more needs no operand
            shorten_sums(self.graph, self.without)
        drop_dead(self.graph)
        self.sizes.propagate(self.graph)
        kept = {str(node.target) for node in self.graph.nodes if node.op == "get_attr"}
        weights = {name: tensor for name, tensor in self.weights.items() if name in kept}
        signature = self.states.signature
        return replace(self.program, graph=self.graph, weights=weights, signature=signature)

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
        self.sizes.give(node)
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

    def _DropTerm(self, edit: DropTerm) -> None:
        join, term = self.nodes[edit.join], self._find(edit.term)
        value = _behind_no_ops(term)
        places = [p for p, other in enumerate(join.args) if _behind_no_ops(other) is value]
        if not ops.is_call(join, "add") or len(places) != 1:
            raise PassError(f"'{edit.term}' is no single term of the sum", place=edit.join)
        self.without.setdefault(join, set()).add(places[0])

    def _Bypass(self, edit: Bypass) -> None:
        for name in (edit.after, edit.entry):
            self._find(name)
        self.bypasses.append(edit)

    def _bypass(self) -> None:
        """Does all bypasses at once: a value that one of them leaves out stands for its entry."""
        order = {node: place for place, node in enumerate(self.graph.nodes)}
        stands_for: dict[fx.Node, fx.Node] = {}
        for edit in self.bypasses:
            entry = self._find(edit.entry)
            for name in (edit.after, *edit.inside):
                known = stands_for.get(self._find(name), entry)
                stands_for[self._find(name)] = min(known, entry, key=order.__getitem__)
        for after in dict.fromkeys(self._find(edit.after) for edit in self.bypasses):
            target = stands_for[after]
            while target in stands_for:
                target = stands_for[target]
            after.replace_all_uses_with(target)

    def _Erase(self, edit: Erase) -> None:
        node = self.nodes.pop(edit.node)
        if node.users:
            raise PassError("a node that is read cannot be erased", place=edit.node)
        self.graph.erase_node(node)

    def _SetArgument(self, edit: SetArgument) -> None:
        node, old, new = self.nodes[edit.node], self._find(edit.old), self._operand(edit.new)
        node.replace_input_with(old, new)
        if not is_same_size(old.meta.get("val"), new.meta.get("val")):
            self.sizes.changed.add(node)

    def _SetCall(self, edit: SetCall) -> None:
        node = self.nodes[edit.node]
        if edit.args is not None:
            node.args = fx.node.map_aggregate(edit.args, self._resolve)
        node.kwargs = fx.node.map_aggregate(dict(edit.kwargs), self._resolve)
        self.sizes.changed.add(node)

    def _ShrinkSizes(self, edit: ShrinkSizes) -> None:
        shrink_sizes(self.nodes[edit.node], edit)
        self.sizes.changed.add(self.nodes[edit.node])

    def _SetWeight(self, edit: SetWeight) -> None:
        if edit.name in self.weights:
            raise PassError("a new weight would hide one that exists", place=edit.name)
        self.weights[edit.name] = edit.value.detach()

    def _Narrow(self, edit: Narrow) -> None:
        self._changed(self.cuts.do(edit))

    def _Multiply(self, edit: Multiply) -> None:
        self._changed(self.cuts.multiply(edit))

    def _changed(self, names: tuple[str, ...]) -> None:
        """Gives weights that were cut their fake values."""
        for name in names:
            node = self.readers[name]
            if not node.users:
                raise PassError("another action put a weight in place of one it cuts", place=name)
            node.meta = {**node.meta, "val": fake_tensor(self.mode, self.weights[name])}
            self.sizes.changed.add(node)

    def _DropState(self, edit: DropState) -> None:
        self.states.drop(edit.input, edit.output)

    def _ResizeState(self, edit: ResizeState) -> None:
        self.states.resize(edit.input, edit.output, edit.axis, edit.size)

    def _AddState(self, edit: AddState) -> None:
        self.nodes[edit.node] = self.states.add(edit)

    def _Once(self, edit: Once) -> None:
        edits = edit.later if edit.name in self.done else edit.first
        self.done.add(edit.name)
        for each in edits:
            getattr(self, f"_{type(each).__name__}")(each)

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


def set_literal(old: fx.Node, value: float) -> None:
    """Writes `value` into the arguments of every reader of `old`."""
    for reader in list(old.users):
        reader.args = fx.node.map_arg(reader.args, lambda node: value if node is old else node)
        reader.kwargs = fx.node.map_arg(reader.kwargs, lambda node: value if node is old else node)


def shorten_sums(graph: fx.Graph, without: Mapping[fx.Node, set[int]]) -> None:
    """Takes terms out of sums, all at once, so that the terms of one sum go in any order.

    A sum that loses both operands is nothing: it leaves the sum that reads it, too.

    Args:
        without: add node -> places of the operands that go.

    Raises:
        PassError: something else than a sum reads a sum that nothing is left of.
    """
    gone: set[fx.Node] = set()
    for node in graph.nodes:
        if node not in without and not any(operand in gone for operand in node.all_input_nodes):
            continue
        places = without.get(node, set()) | {
            i for i, a in enumerate(node.args[:2]) if _is_in(a, gone)
        }
        if ops.is_call(node, "add") and len(places) == 1:
            kept: Any = node.args[1 - min(places)]
            node.replace_all_uses_with(kept)
        elif ops.is_call(node, "add", *ops.CASTS, *ops.COPIES, *ops.DROPOUTS):
            gone.add(node)
        else:
            raise PassError("nothing is left of a sum that it reads", place=node.name)


def _is_in(value: Any, nodes: set[fx.Node]) -> bool:
    return isinstance(value, fx.Node) and value in nodes


def drop_dead(graph: fx.Graph) -> int:
    """Erases pure nodes nobody reads, and inputs marked as dropped. Returns how many."""
    count = 0
    for node in reversed(list(graph.nodes)):
        dead = not node.users and (ops.is_pure(node) or node.meta.get("dropped", False))
        if dead:
            graph.erase_node(node)
            count += 1
    return count


def _behind_no_ops(value: Any) -> Any:
    """The value that an operand only copies."""
    while isinstance(value, fx.Node) and ops.is_call(value, *ops.COPIES, *ops.DROPOUTS):
        value = value.args[0]
    return value
