"""Writes `redpass::` ops back as the ATen ops of their reference, for files that other tools read.

The reference of an op is its definition, so what is put in its place computes the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from redpass import ops, rewrite
from redpass.codegen import ops as kernels_of
from redpass.errors import PassError
from redpass.plan import Action, Edit, Insert, Ref, Replace, SetWeight, WeightRef
from redpass.program import Program


def decompose(program: Program) -> Program:
    """Returns `program` with every `redpass::` op as the ATen ops of its reference.

    Raises:
        PassError: an op whose reference cannot be traced.
    """
    if not has_ops(program):
        return program
    kernels_of.register()
    found = [_action(program, node) for node in program.graph.nodes if _is_op(node)]
    after = rewrite.apply(program, found)
    return replace(after, weights=_whole(after.weights))


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


SAME = (*ops.COPIES - {"clone", "contiguous"}, "view_as")
"""What a trace writes down and a graph without aliasing does not need."""


def _action(program: Program, node: fx.Node) -> Action:
    trace = _Trace(program, node)
    try:
        edits = tuple(trace.edits())
    except PassError:
        raise
    except Exception as error:
        raise PassError(f"its reference cannot be traced: {error}", place=node.name) from error
    return Action("decompose", node.name, edits, f"the ATen ops that {node.name} stands for")


@dataclass
class _Trace:
    """The reference of one node, traced on its operands' fake values."""

    program: Program
    node: fx.Node
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
        op = kernels_of.OPS[ops.base_name(self.node)]
        operands = self.node.all_input_nodes
        names = [argument.name for argument in self.node.target._schema.arguments]  # type: ignore[union-attr]
        arguments = [ops.argument(self.node, name) for name in names]

        def run(*given: Any) -> Any:
            known = dict(zip(operands, given, strict=True))
            return op.reference(*fx.node.map_arg(arguments, known.__getitem__))

        values = [operand.meta["val"] for operand in operands]
        with rewrite.fake_mode(self.program):
            module = make_fx(run, pre_dispatch=True, _allow_non_fake_inputs=True)(*values)
        places = [step for step in module.graph.nodes if step.op == "placeholder"]
        self.named = {p: Ref(o.name) for p, o in zip(places, operands, strict=True)}
        return module

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
