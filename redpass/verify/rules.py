"""The grammar of core form as code: what every program must be before and after every pass.

One walk over the graph, linear in its size. The first broken rule raises, naming the node, what
was found, what was expected, and the lines of graph text around it.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
from torch import Tensor, fx

from redpass.config import from_environment
from redpass.errors import RedpassError, VerifyError, clean
from redpass.fake import fake_call, fake_mode
from redpass.ops import SIZE_FUNCTIONS
from redpass.program import Port, Program
from redpass.verify.sizes import Names, describe

NEIGHBOURS = 3
"""Lines of graph text shown before and after the node at fault."""

OPCODES = ("placeholder", "get_attr", "call_function", "output")


def check_rules(program: Program, *, paranoid: bool | None = None) -> None:
    """Raises at the first rule of core form that `program` breaks.

    Args:
        program: the program to check; nothing is run and nothing is changed.
        paranoid: also compute every node's fake value again and compare it with the one the node
            carries. None asks the environment (`REDPASS_CHECK=paranoid`).

    Raises:
        VerifyError: the node's name, what was found and expected, and the text around it.
    """
    walk = _Walk(program)
    for index, node in enumerate(program.graph.nodes):
        walk.index = index
        walk.check(node)
    walk.finish()
    _check_ports(walk, program)
    _check_state(program)
    if from_environment().check == "paranoid" if paranoid is None else paranoid:
        _check_derivation(walk, program)


@dataclass
class _Walk:
    program: Program
    index: int = 0
    seen: set[fx.Node] = field(default_factory=set)
    names: set[str] = field(default_factory=set)
    read: dict[str, str] = field(default_factory=dict)
    placeholders: list[fx.Node] = field(default_factory=list)
    output: fx.Node | None = None

    def fail(self, node: fx.Node, found: str, expected: str) -> NoReturn:
        fail(self.program, node, found, expected)

    def check(self, node: fx.Node) -> None:
        if node.op not in OPCODES:
            self.fail(node, f"is a '{node.op}' node", f"only {', '.join(OPCODES)}")
        if self.output is not None:
            self.fail(node, "comes after the output", "the output as the last node")
        if node.name in self.names:
            self.fail(node, "has the name of an earlier node", "each name once")
        for operand in node.all_input_nodes:
            if operand not in self.seen:
                self._misplaced(node, operand)
        getattr(self, f"_{node.op}")(node)
        self.seen.add(node)
        self.names.add(node.name)

    def finish(self) -> None:
        if self.output is None:
            raise VerifyError("the graph has no output node", hint="expected exactly one")
        unread = sorted(self.program.weights.keys() - self.read.keys())
        if unread:
            raise VerifyError(
                f"{len(unread)} weights are read by no node",
                place=unread[0],
                hint="expected every weight to have its get_attr node",
            )

    def _misplaced(self, node: fx.Node, operand: fx.Node) -> NoReturn:
        where = "defined later" if operand.graph is node.graph else "in another graph"
        found = f"reads '{operand.name}', which is {where}"
        self.fail(node, found, "operands of the same graph, defined before they are used")

    def _placeholder(self, node: fx.Node) -> None:
        self._value(node)
        self.placeholders.append(node)

    def _get_attr(self, node: fx.Node) -> None:
        target = str(node.target)
        weight = self.program.weights.get(target)
        if not isinstance(weight, Tensor):
            self.fail(node, f"reads '{target}', which is not a weight", "a name in weights")
        if target in self.read:
            found = f"reads '{target}', as '{self.read[target]}' does"
            self.fail(node, found, "one get_attr node a weight")
        self.read[target] = node.name
        value = self._value(node)
        if not isinstance(value, Tensor) or _kind(value) != _kind(weight):
            self.fail(
                node, f"carries the value {describe(value)}", f"the weight's {describe(weight)}"
            )

    def _call_function(self, node: fx.Node) -> None:
        target = node.target
        if isinstance(target, torch._ops.OpOverload):
            if target._schema.is_mutable:
                self.fail(node, f"calls '{target}', which changes its arguments", "functional ops")
            self._arguments(node, target)
        elif target not in SIZE_FUNCTIONS and target is not operator.getitem:
            name = getattr(target, "__name__", target)
            expected = "an ATen or redpass:: overload, getitem, or a function on sizes"
            self.fail(node, f"calls '{name}'", expected)
        self._value(node)

    def _arguments(self, node: fx.Node, target: torch._ops.OpOverload) -> None:
        parameters = target._schema.arguments
        positional = [p for p in parameters if not p.kwarg_only]
        known = {p.name for p in parameters}
        given = {p.name for p in positional[: len(node.args)]} | node.kwargs.keys()
        missing = [p.name for p in parameters if not p.has_default_value() and p.name not in given]
        unknown = sorted(node.kwargs.keys() - known)
        if missing or unknown or len(node.args) > len(positional):
            found = f"has {len(node.args)} arguments, missing {missing}, unknown {unknown}"
            self.fail(node, found, str(target._schema))

    def _output(self, node: fx.Node) -> None:
        values = node.args[0] if len(node.args) == 1 else None
        if not isinstance(values, tuple | list) or not all(isinstance(v, fx.Node) for v in values):
            self.fail(node, "does not return a flat tuple of nodes", "(value, value, ...)")
        self.output = node

    def _value(self, node: fx.Node) -> Any:
        if "val" not in node.meta:
            self.fail(node, "carries no value in meta['val']", "a fake tensor or a size")
        return node.meta["val"]


def fail(program: Program, node: fx.Node, found: str, expected: str) -> NoReturn:
    """Raises `VerifyError` for `node` with the graph text around it."""
    hint = f"expected {expected}\n" + "\n".join(_excerpt(program, node))
    raise VerifyError(found, place=node.name, hint=hint)


def _excerpt(program: Program, node: fx.Node) -> Iterator[str]:
    lines = program.text.split("\n")
    index = list(program.graph.nodes).index(node)
    for at in range(max(0, index - NEIGHBOURS), min(len(lines), index + NEIGHBOURS + 1)):
        yield f"  {'>' if at == index else ' '} {clean(lines[at])}"


def _kind(value: Tensor) -> tuple[torch.dtype, tuple[Any, ...]]:
    return value.dtype, tuple(value.shape)


def _check_ports(walk: _Walk, program: Program) -> None:
    signature, names = program.signature, Names()
    outputs: Any = walk.output.args[0] if walk.output is not None else ()
    sides = (("input", signature.inputs, walk.placeholders), ("output", signature.outputs, outputs))
    for side, ports, nodes in sides:
        if len(ports) != len(nodes):
            raise VerifyError(
                f"the graph has {len(nodes)} {side}s, the signature {len(ports)}",
                hint=f"expected {', '.join(map(str, ports))}",
            )
        if len({port.name for port in ports}) != len(ports):
            raise VerifyError(f"two {side} ports have one name", hint="expected each name once")
    _learn_names(names, signature.inputs, walk.placeholders)
    for side, ports, nodes in sides:
        for port, node in zip(ports, nodes, strict=True):
            _check_port(program, names, side, port, node)


def _learn_names(names: Names, ports: tuple[Port, ...], nodes: list[fx.Node]) -> None:
    shapes = [
        (port.shape, getattr(node.meta["val"], "shape", ()))
        for port, node in zip(ports, nodes, strict=True)
    ]
    pairs = [pair for want, found in shapes for pair in zip(want, found, strict=False)]
    for want, size in sorted(pairs, key=lambda pair: not str(pair[0]).isidentifier()):
        names.learn(want, size)


def _check_port(program: Program, names: Names, side: str, port: Port, node: fx.Node) -> None:
    value = node.meta["val"]
    expected = f"{side} port '{port.name}' as {port}"
    if not isinstance(value, Tensor) or value.dtype != port.dtype or value.dim() != len(port.shape):
        fail(program, node, f"gives {describe(value)}", expected)
    for axis, (want, size) in enumerate(zip(port.shape, value.shape, strict=True)):
        if not names.agree(want, size):
            found = f"has size {names.show(size)} on axis {axis} of {describe(value)}"
            fail(program, node, found, expected)


def _check_state(program: Program) -> None:
    inputs = {port.name: port for port in program.signature.inputs}
    outputs = {port.name: port for port in program.signature.outputs}
    for source, result in program.signature.state:
        first, last = inputs.get(source), outputs.get(result)
        if first is None or last is None:
            missing = source if first is None else result
            raise VerifyError("a state pair names a port that does not exist", place=missing)
        if (first.dtype, len(first.shape)) != (last.dtype, len(last.shape)):
            hint = f"expected {last} to have the dtype and rank of {first}"
            raise VerifyError("a state pair's ports differ", place=result, hint=hint)


def _check_derivation(walk: _Walk, program: Program) -> None:
    mode, names = fake_mode(program), Names()
    for node in program.graph.nodes:
        if node.op != "call_function":
            continue
        try:
            again = fake_call(mode, node)
        except RedpassError:
            raise
        except Exception as error:
            walk.fail(node, f"cannot be computed from its operands: {error}", "a well-formed call")
        carried = node.meta["val"]
        if not names.same(again, carried):
            walk.fail(node, f"carries the value {describe(carried)}", f"{describe(again)}")
