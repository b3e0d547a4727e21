"""State ports: their edits, what else gives the sizes a dropped one gave, numbering the rest."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import sympy
import torch
from torch import fx

from redpass import ops
from redpass.errors import PassError
from redpass.fake import Sizes
from redpass.program import Port, Program, Signature, output_node

_NUMBERED = re.compile(r"(?P<stem>\D+)(?P<number>\d+)(?P<rest>\D*)")


@dataclass(frozen=True)
class AddState:
    """An edit: adds a state pair beside one that exists; it is dropped with that one.

    It holds as many entries as that one along `axis`, but at most `most`.

    Attributes:
        input: name of the new input, which comes behind `beside` among the inputs.
        output: name of the new output.
        beside: input of the pair that it goes with.
        node: what other edits of the action call the new input.
        value: name of the node that is returned.
        axis: the axis along which `beside` grows.
        most: the largest size of that axis.
        sizes: axis -> constant size, where it is another than that of `beside`.
    """

    input: str
    output: str
    beside: str
    node: str
    value: str
    axis: int
    most: int
    sizes: Mapping[int, int] = field(default_factory=dict)


@dataclass
class States:
    """The state pairs of a graph that is being edited.

    Attributes:
        inputs: input name -> placeholder.
    """

    graph: fx.Graph
    signature: Signature
    sizes: Sizes
    inputs: dict[str, fx.Node] = field(default_factory=dict)
    dropped: set[str] = field(default_factory=set)
    added: list[AddState] = field(default_factory=list)

    def __post_init__(self) -> None:
        nodes = [node for node in self.graph.nodes if node.op == "placeholder"]
        self.inputs = dict(zip([p.name for p in self.signature.inputs], nodes, strict=True))

    def drop(self, source: str, result: str) -> None:
        """Takes a pair out of the inputs and outputs."""
        ports = self.signature
        keep = [i for i, port in enumerate(ports.outputs) if port.name != result]
        out = output_node(self.graph)
        values: Any = out.args[0]
        out.args = (tuple(values[i] for i in keep),)
        resource_sizes(self.graph, self.inputs[source])
        self.signature = replace(
            ports,
            inputs=tuple(port for port in ports.inputs if port.name != source),
            outputs=tuple(ports.outputs[i] for i in keep),
            state=tuple(pair for pair in ports.state if pair != (source, result)),
        )
        self.inputs[source].meta["dropped"] = True
        self.dropped.add(source)

    def resize(self, source: str, result: str, axis: int, size: int) -> None:
        """Gives a pair another constant size on one axis."""
        self.sizes.resize(self.inputs[source], axis, size)
        self.signature = self.signature.resized({source, result}, axis, size)

    def add(self, edit: AddState) -> fx.Node:
        """Puts down the input of a new pair; `finish` returns its value."""
        if edit.input in self.inputs:
            raise PassError("a new state would hide an input that exists", place=edit.input)
        beside = self.inputs[edit.beside]
        with self.graph.inserting_after(beside):
            node = self.graph.placeholder(edit.node)
        self.sizes.limit(beside, node, edit.axis, edit.most, edit.sizes)
        self.inputs[edit.input] = node
        self.added.append(edit)
        return node

    def finish(self, find: Callable[[str], fx.Node]) -> None:
        """Returns the values of new pairs; those beside a pair that was dropped are none."""
        for edit in self.added:
            if edit.beside in self.dropped:
                self.inputs[edit.input].meta["dropped"] = True
                continue
            out, ports = output_node(self.graph), self.signature
            pair = next(pair for pair in ports.state if pair[0] == edit.beside)
            at = [[port.name for port in ports.inputs].index(pair[0]) + 1]
            at.append([port.name for port in ports.outputs].index(pair[1]) + 1)
            values: Any = list(out.args[0])  # type: ignore[arg-type]
            values.insert(at[1], find(edit.value))
            out.args = (tuple(values),)
            new = [_limited(ports.input(pair[0]), edit, edit.input)]
            new.append(_limited(ports.output(pair[1]), edit, edit.output))
            self.signature = replace(
                ports,
                inputs=(*ports.inputs[: at[0]], new[0], *ports.inputs[at[0] :]),
                outputs=(*ports.outputs[: at[1]], new[1], *ports.outputs[at[1] :]),
                state=(*ports.state, (edit.input, edit.output)),
            )


def _limited(port: Port, edit: AddState, name: str) -> Port:
    shape = [edit.sizes.get(axis, size) for axis, size in enumerate(port.shape)]
    shape[edit.axis] = f"Min({edit.most}, {shape[edit.axis]})"
    return replace(port, name=name, shape=tuple(shape))


def renumber_state(program: Program) -> Program:
    """Returns the program with its numbered state counted from 0 without gaps.

    `past_key_values.3.key` is called `past_key_values.2.key` when one of the entries before it was
    dropped, as every runtime that fills the entries in order wants it. Names of another form, and
    those of programs without a gap, stay.
    """
    pairs = program.signature.state
    known = dict(_renumbered(name for name, _ in pairs)) | dict(_renumbered(n for _, n in pairs))
    if all(old == new for old, new in known.items()):
        return program

    def named(port: Port) -> Port:
        return replace(port, name=known.get(port.name, port.name))

    ports = program.signature
    signature = replace(
        ports,
        inputs=tuple(map(named, ports.inputs)),
        outputs=tuple(map(named, ports.outputs)),
        state=tuple((known[a], known[b]) for a, b in pairs),
    )
    return replace(program, signature=signature)


def _renumbered(names: Iterable[str]) -> list[tuple[str, str]]:
    """Each name with what it is to be called, where all of them hold one number."""
    known = list(names)
    parts = {name: _NUMBERED.fullmatch(name) for name in known}
    numbers: dict[str, set[int]] = {}
    for found in parts.values():
        if found is None:
            return [(name, name) for name in known]
        numbers.setdefault(found["stem"], set()).add(int(found["number"]))
    places = {
        stem: {number: place for place, number in enumerate(sorted(used))}
        for stem, used in numbers.items()
    }
    return [
        (name, f"{f['stem']}{places[f['stem']][int(f['number'])]}{f['rest']}")
        for name, f in parts.items()
        if f is not None
    ]


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
