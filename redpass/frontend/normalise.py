"""Turns what `torch.export` gives into core form.

The usual road to a functional graph, `run_decompositions({})`, traces the whole model a second
time. Most graphs need only bookkeeping: weights read by name instead of passed in, gradient
switches inlined, checks dropped. So that is done here in one walk, and only graphs that hold
other in-place ops take the slow road.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind

from redpass.errors import TraceError
from redpass.ops import aten, one_name

IDENTITIES = frozenset(
    {aten.alias.default, aten.detach.default, aten.detach_.default, aten.lift_fresh_copy.default}
)
"""Ops that give back their operand when there are no gradients."""

CHECKS = ("_assert", "sym_constrain", "_check")
KEPT_META = ("nn_module_stack", "stack_trace")


@dataclass
class Core:
    """A graph in core form under construction, and the weights it reads."""

    graph: fx.Graph = field(default_factory=fx.Graph)
    weights: dict[str, Tensor] = field(default_factory=dict)


def core_form(exported: ExportedProgram, inputs: tuple[str, ...], prefix: str) -> Core:
    """Returns the graph of `exported` in core form, without fake values.

    Args:
        exported: a program whose user inputs are the flat tensors `inputs`.
        inputs: public input names, in order; placeholders are named after them.
        prefix: name of the wrapper's attribute, cut off weight names and module paths.

    Raises:
        TraceError: a write to a buffer or an input, nested control flow, or an unknown call.
    """
    if any(map(_mutates, _all_nodes(exported.graph_module))):
        exported = _functional(exported)
    _refuse_writes(exported, prefix)
    return _Copier(exported, inputs, prefix).run()


def _functional(exported: ExportedProgram) -> ExportedProgram:
    try:
        functional: ExportedProgram = exported.run_decompositions({})
    except Exception as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise TraceError(
            f"the model's in-place writes cannot be removed: {first}",
            hint="write to a copy (`x = x + y` in place of `x += y`)",
        ) from error
    return functional


def _all_nodes(module: fx.GraphModule) -> Iterator[fx.Node]:
    yield from module.graph.nodes
    for child in module.children():
        if isinstance(child, fx.GraphModule):
            yield from _all_nodes(child)


def _mutates(node: fx.Node) -> bool:
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return _is_enabled_autocast(node)
    return target._schema.is_mutable and target not in IDENTITIES


def _refuse_writes(exported: ExportedProgram, prefix: str) -> None:
    for spec in exported.graph_signature.output_specs:
        if spec.kind in (OutputKind.BUFFER_MUTATION, OutputKind.PARAMETER_MUTATION):
            raise TraceError(
                "the forward writes to this buffer, so two calls differ",
                place=_cut(str(spec.target), prefix),
                hint="make it an input and an output, or switch the update off (model.eval())",
            )
        if spec.kind == OutputKind.USER_INPUT_MUTATION:
            raise TraceError(
                "the forward writes to its input",
                place=str(spec.target),
                hint="let the forward write to a copy (`x = x.clone()`)",
            )


def _is_enabled_autocast(node: fx.Node) -> bool:
    return _operator_name(node) == "wrap_with_autocast" and bool(node.args[2])


def _operator_name(node: fx.Node) -> str:
    return getattr(node.target, "__name__", "") if node.op == "call_function" else ""


def _cut(name: str, prefix: str) -> str:
    return name.removeprefix(f"{prefix}.")


def _safe(name: str) -> str:
    word = re.sub(r"\W", "_", name)
    return word if not word[:1].isdigit() else f"_{word}"


class _Copier:
    """Copies nodes to a new graph, one walk in order."""

    def __init__(self, exported: ExportedProgram, inputs: tuple[str, ...], prefix: str) -> None:
        self.exported, self.prefix = exported, prefix
        self.core = Core()
        self.values: dict[fx.Node, Any] = {}
        self.readers: dict[str, fx.Node] = {}
        self.owners: dict[tuple[Any, ...], str] = {}
        self.inputs = iter(inputs)

    def run(self) -> Core:
        specs = {spec.arg.name: spec for spec in self.exported.graph_signature.input_specs}
        for node in self.exported.graph.nodes:
            if node.op == "placeholder":
                self._placeholder(node, specs[node.name])
        result = self._body(self.exported.graph_module)
        self.core.graph.output(tuple(result))
        self._drop_unread()
        return self.core

    def _placeholder(self, node: fx.Node, spec: Any) -> None:
        if spec.kind == InputKind.USER_INPUT:
            name = next(self.inputs)
            self.values[node] = self.core.graph.create_node(
                "placeholder", _safe(name), name=_safe(name)
            )
            return
        if spec.kind in (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR):
            name = _cut(str(spec.target), self.prefix)
            self.values[node] = self._weight(name, self._tensor(spec))
            return
        raise TraceError(f"the model takes a {spec.kind.name.lower()}", place=str(spec.target))

    def _tensor(self, spec: Any) -> Tensor:
        target = str(spec.target)
        state, constants = self.exported.state_dict, self.exported.constants
        found: Tensor = state[target] if target in state else constants[target]
        return found

    def _weight(self, name: str, tensor: Tensor) -> fx.Node:
        """Returns the one reader of a weight; tied weights share it."""
        key = storage_key(tensor)
        name = self.owners.setdefault(key, name)
        if name not in self.readers:
            self.core.weights[name] = tensor.detach()
            self.readers[name] = self.core.graph.create_node("get_attr", name, name=_safe(name))
        return self.readers[name]

    def _body(self, module: fx.GraphModule) -> list[Any]:
        for node in module.graph.nodes:
            if node.op == "call_function":
                self.values[node] = self._call(node)
            elif node.op == "get_attr":
                self.values[node] = getattr(module, str(node.target))
            elif node.op == "output":
                return list(self._map(node.args[0]))
            elif node.op != "placeholder":
                raise TraceError(f"a call to {node.target} is left in the graph", place=node.name)
        raise TraceError("the graph has no output")

    def _call(self, node: fx.Node) -> Any:
        name = _operator_name(node)
        if name in ("wrap_with_set_grad_enabled", "wrap_with_autocast"):
            return self._inline(node, 1 if name == "wrap_with_set_grad_enabled" else 4)
        if isinstance(node.target, torch._ops.HigherOrderOperator):
            raise TraceError(
                f"'{name}' is control flow on data, which a program cannot hold",
                place=node.name,
                hint="replace it by torch.where, or trace the parts on their own",
            )
        if name.startswith(CHECKS):
            return None
        if node.target in IDENTITIES:
            return self._map(node.args[0])
        if name == "getitem" and isinstance(self._map(node.args[0]), list | tuple):
            return self._map(node.args[0])[node.args[1]]
        return self._copy(node)

    def _inline(self, node: fx.Node, position: int) -> list[Any]:
        child = self._map(node.args[position])
        inner = [n for n in child.graph.nodes if n.op == "placeholder"]
        for placeholder, value in zip(inner, node.args[position + 1 :], strict=True):
            self.values[placeholder] = self._map(value)
        return self._body(child)

    def _copy(self, node: fx.Node) -> fx.Node:
        args, kwargs = self._map(node.args), self._map(dict(node.kwargs))
        target = one_name(node.target)
        copy = self.core.graph.create_node("call_function", target, args, kwargs, node.name)
        copy.meta = {key: node.meta[key] for key in KEPT_META if key in node.meta}
        if "nn_module_stack" in copy.meta:
            copy.meta["nn_module_stack"] = _shorten(copy.meta["nn_module_stack"], self.prefix)
        return copy

    def _map(self, value: Any) -> Any:
        if isinstance(value, fx.Node):
            return self.values[value]
        if isinstance(value, dict):
            return {key: self._map(part) for key, part in value.items()}
        if isinstance(value, tuple | list):
            return type(value)(map(self._map, value))
        # A program's fake values live on the CPU, also when it was traced without weight data.
        return torch.device("cpu") if value == torch.device("meta") else value

    def _drop_unread(self) -> None:
        for name, node in self.readers.items():
            if not node.users:
                self.core.graph.erase_node(node)
                del self.core.weights[name]


def storage_key(tensor: Tensor) -> tuple[Any, ...]:
    """Returns what two tensors share exactly when they are the same view of the same memory."""
    storage = tensor.untyped_storage()._cdata
    return storage, tensor.storage_offset(), tuple(tensor.shape), tensor.stride(), tensor.dtype


def _shorten(stack: Mapping[str, tuple[str, Any]], prefix: str) -> dict[str, tuple[str, Any]]:
    """Cuts the wrapper off a module stack: its entry, and the first part of every path."""
    short = {}
    for key, (path, kind) in stack.items():
        if path and path != prefix:
            short[key] = (_cut(path, prefix), kind)
    return short
