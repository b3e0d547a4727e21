"""Writes `redpass::` ops back as ATen ops: for files that other tools read, and to run on a CPU.

The reference of an op is its definition, so what is put in its place computes the same. On a CPU
it is also faster: a call of an op that is written in Python costs as much as ten ATen calls
(`benchmarks/results/op_overhead.md`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch.fx.experimental.proxy_tensor import make_fx

from redpass import ops, rewrite
from redpass.codegen import ops as kernels_of
from redpass.errors import PassError
from redpass.fake import fake_mode
from redpass.plan import Action, Edit, Insert, Ref, Replace, SetWeight, WeightRef
from redpass.program import Program


def decompose(program: Program) -> Program:
    """Returns `program` with every `redpass::` op as the ATen ops of its reference.

    Raises:
        PassError: an op whose reference cannot be traced.
    """
    if not has_ops(program):
        return program
    traced: dict[str, fx.GraphModule] = {}
    after = _written_back(program, lambda node: _action(program, node, traced))
    return replace(after, weights=_whole(after.weights))


def as_run(program: Program) -> Program:
    """Returns `program` as it is run where its weights are: no `redpass::` op on a CPU.

    Raises:
        PassError: an op whose reference cannot be traced.
    """
    devices = {tensor.device.type for tensor in program.weights.values()}
    if devices != {"cpu"} or not has_ops(program):
        return program
    traced: dict[str, fx.GraphModule] = {}

    def action(node: fx.Node) -> Action:
        function = kernels_of.OPS[ops.base_name(node)].inline
        if function is None:
            return _action(program, node, traced)
        return _called(program, node, function)

    return _written_back(program, action)


def _written_back(program: Program, action: Callable[[fx.Node], Action]) -> Program:
    kernels_of.register()
    nodes = [node for node in program.graph.nodes if _is_op(node)]
    return rewrite.apply(program, [action(node) for node in nodes])


def _called(program: Program, node: fx.Node, function: Callable[..., Any]) -> Action:
    """A call of the function that stands for the op on a CPU."""
    op, arguments = kernels_of.OPS[ops.base_name(node)], _arguments(node)
    with fake_mode(program):
        values = fx.node.map_arg(arguments, lambda operand: operand.meta["val"])
    constants = [
        SetWeight(f"{node.name}_{place}", tensor, "a constant of an op")
        for place, tensor in enumerate(op.constants(*values))
    ]
    refs = [WeightRef(constant.name) for constant in constants]
    given = [Ref(item.name) if isinstance(item, fx.Node) else item for item in arguments]
    name = f"{node.name}_called"
    call = Insert(name, function, (*given, *refs), node.name)
    edits: tuple[Edit, ...] = (*constants, call, Replace(node.name, name))
    return Action("decompose", node.name, edits, f"what {node.name} stands for")


def _arguments(node: fx.Node) -> list[Any]:
    """All arguments of an op, in the order of its schema."""
    names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
    return [ops.argument(node, name) for name in names]


def _whole(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies parts of tensors that are not among the weights themselves: files store wholes."""
    whole = {_storage(tensor) for tensor in weights.values() if _is_whole(tensor)}
    return {
        name: tensor if _is_whole(tensor) or _storage(tensor) in whole else tensor.clone()
        for name, tensor in weights.items()
    }


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _is_whole(tensor: Tensor) -> bool:
    return tensor.is_meta or tensor.nbytes == tensor.untyped_storage().nbytes()


def has_ops(program: Program) -> bool:
    """Whether a `redpass::` op stands in the graph."""
    return any(_is_op(node) for node in program.graph.nodes)


def _is_op(node: fx.Node) -> bool:
    return ops.namespace(node) == "redpass" and ops.base_name(node) in kernels_of.OPS


def _kind(value: Any) -> tuple[str, ...]:
    """What a trace depends on."""
    if not isinstance(value, Tensor):
        return (str(value),)
    return str(tuple(value.shape)), str(value.stride()), str(value.dtype), str(value.device)


SAME = (*ops.COPIES - {"clone", "contiguous"}, "view_as")
"""What a trace writes down and a graph without aliasing does not need."""


def _action(program: Program, node: fx.Node, traced: dict[str, fx.GraphModule]) -> Action:
    trace = _Trace(program, node, traced)
    try:
        edits = tuple(trace.edits())
    except PassError:
        raise
    except Exception as error:
        raise PassError(f"its reference cannot be traced: {error}", place=node.name) from error
    return Action("decompose", node.name, edits, f"the ATen ops that {node.name} stands for")


@dataclass
class _Trace:
    """The reference of the op of one node, traced on its operands' fake values.

    `traced` keeps the traces: the layers of a model are alike.
    """

    program: Program
    node: fx.Node
    traced: dict[str, fx.GraphModule]
    named: dict[fx.Node, Any] = field(default_factory=dict)

    def edits(self) -> Iterator[Edit]:
        module = self._traced()
        for step in module.graph.nodes:
            if step.op == "get_attr":
                name = f"{self.node.name}_{step.target}"
                yield SetWeight(name, getattr(module, str(step.target)), "a constant of an op")
                self.named[step] = WeightRef(name)
            elif step.op == "call_function":
                yield from self._step(step)
            elif step.op == "output":
                yield from self._results(step.args[0])

    def _traced(self) -> fx.GraphModule:
        operands = self.node.all_input_nodes
        arguments = _arguments(self.node)
        kinds = {node: (at, _kind(node.meta["val"])) for at, node in enumerate(operands)}
        key = repr((str(self.node.target), fx.node.map_arg(arguments, kinds.__getitem__)))
        if key not in self.traced:
            self.traced[key] = self._trace(operands, arguments)
        module = self.traced[key]
        places = [step for step in module.graph.nodes if step.op == "placeholder"]
        self.named = {p: Ref(o.name) for p, o in zip(places, operands, strict=True)}
        return module

    def _trace(self, operands: list[fx.Node], arguments: list[Any]) -> fx.GraphModule:
        function = kernels_of.OPS[ops.base_name(self.node)].reference

        def run(*given: Any) -> Any:
            known = dict(zip(operands, given, strict=True))
            return function(*fx.node.map_arg(arguments, known.__getitem__))

        values = [operand.meta["val"] for operand in operands]
        # Before torch 2.13 products of batches fix symbolic sizes outside of Python's dispatcher.
        with fake_mode(self.program), enable_python_dispatcher():
            return make_fx(run, pre_dispatch=True, _allow_non_fake_inputs=True)(*values)

    def _step(self, step: fx.Node) -> Iterator[Edit]:
        source = step.args[0] if step.args else None
        if ops.is_call(step, *SAME) and isinstance(source, fx.Node):
            self.named[step] = self.named[source]
            return
        name = f"{self.node.name}_{step.name}"
        args = fx.node.map_arg(step.args, self.named.__getitem__)
        kwargs = fx.node.map_arg(step.kwargs, self.named.__getitem__)
        yield Insert(name, step.target, args, self.node.name, kwargs)  # type: ignore[arg-type]
        self.named[step] = Ref(name)

    def _results(self, output: Any) -> Iterator[Edit]:
        if isinstance(output, fx.Node):
            yield self._replaced(self.node, output)
            return
        for reader in self.node.users:
            yield self._replaced(reader, output[reader.args[1]])

    def _replaced(self, old: fx.Node, new: fx.Node) -> Replace:
        found = self.named[new]
        return Replace(old.name, found if isinstance(found, WeightRef) else found.name)
