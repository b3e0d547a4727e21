"""The pointwise nodes after a hot path, and how they become the epilogue of its kernel.

A kernel marks the place with a comment, `# epilogue: y`, above the store of `y`. The tail is
printed there; operands of its own are loaded at the addresses of the store.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from redpass import ops
from redpass.codegen.expression import Printed, UnprintableError, print_expression, why_not
from redpass.text import op_name

MARK = re.compile(r"^(?P<indent> *)# epilogue: (?P<name>\w+)$")

LAUNCH = re.compile(r"^ +\w+\[.+\]\($", re.MULTILINE)
"""The line that launches a kernel, as `ruff format` leaves it or `fmt: skip` keeps it."""


@dataclass(frozen=True)
class Tail:
    """Pointwise nodes that end in one value.

    Attributes:
        source: the node whose value they start from: a result of the hot path.
        nodes: in graph order.
        extras: other tensors they read, of the same shape and dtype as the result.
    """

    source: fx.Node
    nodes: tuple[fx.Node, ...]
    extras: tuple[fx.Node, ...]

    @property
    def parameters(self) -> tuple[str, ...]:
        """The names of the extra operands in the emitted file."""
        return tuple(f"tail_{place}" for place in range(len(self.extras)))

    @property
    def names(self) -> dict[fx.Node, str]:
        """What the nodes are called in the file: by their op, the same in layers that are equal."""
        found: dict[fx.Node, str] = {}
        for node in self.nodes:
            name = f"tail_{ops.base_name(node).strip('_')}"
            number = sum(other.startswith(name) for other in found.values())
            found[node] = f"{name}_{number + 1}" if number else name
        return found

    def printed(self, value: str) -> Printed:
        """The nodes as Triton, where `value` holds the source and `tail_0_value` an operand."""
        values = (f"{parameter}_value" for parameter in self.parameters)
        leaves = {self.source: value, **dict(zip(self.extras, values, strict=True))}
        return print_expression(self.nodes, leaves, self.names)

    def in_torch(self, value: str) -> tuple[str, ...]:
        """The nodes as lines of PyTorch, the last one assigning to `value`."""
        names = {self.source: value, **dict(zip(self.extras, self.parameters, strict=True))}
        lines = []
        for node, name in self.names.items():
            parts = [_literal(item, names) for item in node.args]
            parts += [f"{key}={_literal(item, names)}" for key, item in node.kwargs.items()]
            names[node] = value if node is self.nodes[-1] else name
            text = f"torch.ops.aten.{op_name(node.target)}({', '.join(parts)})"
            lines.append(f"{names[node]} = {text}")
        return tuple(lines)


def find_tail(result: fx.Node, *, with_operands: bool = True) -> Tail | None:
    """Returns the longest chain of printable pointwise nodes that alone reads `result`.

    Every value on the way keeps the result's shape and dtype and is read once.

    Args:
        with_operands: whether the chain may read other tensors.
    """
    form, order = _form(result), {node: i for i, node in enumerate(result.graph.nodes)}
    nodes: list[fx.Node] = []
    extras: list[fx.Node] = []
    last = result
    while (node := _next(last, form)) is not None:
        others = [o for o in node.all_input_nodes if o is not last and o not in extras]
        if others and not with_operands:
            break
        if any(_form(other) != form or order[other] > order[node] for other in others):
            break
        nodes.append(node)
        extras += others
        last = node
    return Tail(result, tuple(nodes), tuple(extras)) if nodes else None


def _next(last: fx.Node, form: Any) -> fx.Node | None:
    if len(last.users) != 1:
        return None
    node = next(iter(last.users))
    if node.op != "call_function" or not (ops.is_elementwise(node) or ops.is_call(node, "to")):
        return None
    return node if _form(node) == form and not why_not(node) else None


def _form(node: fx.Node) -> Any:
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor):
        return None
    return value.dtype, [ops.expression(size) for size in value.shape]


def _literal(value: Any, names: dict[fx.Node, str]) -> str:
    if isinstance(value, fx.Node):
        return names[value]
    if isinstance(value, float) and value in (float("inf"), float("-inf")):
        return f'float("{value}")'
    return repr(value)


def insert_epilogue(text: str, tail: Tail) -> str:
    """Returns kernel source with `tail` printed at its mark.

    Raises:
        UnprintableError: there is no mark, or two (partial results would get the tail twice), or
            what follows it is no plain store.
    """
    lines = text.split("\n")
    places = [place for place, line in enumerate(lines) if MARK.match(line)]
    if len(places) != 1:
        raise UnprintableError(f"the kernel marks {len(places)} places for an epilogue")
    if tail.extras and len(LAUNCH.findall(text)) > 1:
        raise UnprintableError("of several kernels only the last would take the tail's operands")
    _insert(lines, places[0], tail)
    return _with_parameters("\n".join(lines), tail.parameters)


def _insert(lines: list[str], mark: int, tail: Tail) -> None:
    found = MARK.match(lines[mark])
    assert found is not None
    indent, name = found["indent"], found["name"]
    place, store = _store_after(lines, mark + 1, indent)
    printed = tail.printed(name)
    loads = [
        f"{parameter}_value = tl.load({_moved(lines, store, parameter)}, mask={_mask(store)}, "
        "other=0.0)"
        ".to(tl.float32)"
        for parameter in tail.parameters
    ]
    result = [f"{name} = {printed.result}"] if printed.result != name else []
    # Right above the store: what its address is made of is there.
    lines[place:place] = [indent + line for line in (*loads, *printed.lines, *result)]
    del lines[mark]


def _store_after(lines: list[str], first: int, indent: str) -> tuple[int, ast.Call]:
    """The line and the call of the first `tl.store` after a mark, in the block of the mark."""
    rest = []
    for line in lines[first:]:
        if line.strip() and not line.startswith(indent):
            break
        rest.append(line.removeprefix(indent))
    for statement in ast.parse("\n".join(rest)).body:
        value = statement.value if isinstance(statement, ast.Expr) else None
        if isinstance(value, ast.Call) and ast.unparse(value.func) == "tl.store":
            return first + statement.lineno - 1, value
    raise UnprintableError("no store follows the mark of the epilogue")


def _moved(lines: list[str], store: ast.Call, parameter: str) -> str:
    """The address of the store, in another tensor: its leftmost name is the pointer."""
    address = ast.parse(ast.unparse(store.args[0]), mode="eval")
    pointer: ast.expr = address.body
    while isinstance(pointer, ast.BinOp):
        pointer = pointer.left
    pointers = {
        argument.arg
        for function in ast.parse("\n".join(lines)).body
        if isinstance(function, ast.FunctionDef)
        for argument in function.args.args
    }
    if not isinstance(pointer, ast.Name) or pointer.id not in pointers:
        raise UnprintableError("the store after the mark has no plain address")
    pointer.id = parameter
    return ast.unparse(address)


def _mask(store: ast.Call) -> str:
    masks = [keyword.value for keyword in store.keywords if keyword.arg == "mask"]
    if not masks:
        raise UnprintableError("the store after the mark has no mask")
    return ast.unparse(masks[0])


def _with_parameters(text: str, parameters: Sequence[str]) -> str:
    """Adds parameters to every kernel whose body uses them."""
    if not parameters:
        return text
    lines = text.split("\n")
    for function in reversed([n for n in ast.parse(text).body if isinstance(n, ast.FunctionDef)]):
        used = {n.id for n in ast.walk(function) if isinstance(n, ast.Name)}
        if not used & set(parameters):
            continue
        last = function.args.args[-1]
        end = last.annotation or last
        row, column = (end.end_lineno or 0) - 1, end.end_col_offset or 0
        own = lines[row].startswith(" ")
        joint = ",\n    " if own else ", "
        added = "".join(joint + parameter for parameter in parameters)
        lines[row] = lines[row][:column] + added + lines[row][column:]
    return "\n".join(lines)
