"""`Program`: the one form every frontend produces, every pass rewrites and every backend reads.

A program is a `torch.fx.Graph` in *core form* and the weights it reads. Core form:

- `placeholder` nodes are the public inputs, in the order of the signature;
- `get_attr` nodes are weights (parameters, buffers, constants), at most one node a weight;
- `call_function` nodes call functional ATen or `redpass::` overloads, or Python operators on
  symbolic sizes; nothing is mutated, nothing is nested;
- the one `output` node returns a flat tuple in the order of the signature;
- each node carries its fake value (shape with symbols, dtype) in `node.meta["val"]`.

Programs are values: a rewrite makes a new one and shares the weights by reference.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import PurePath
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, fx

from redpass import half_precision
from redpass.errors import UsageError
from redpass.signature import Port as Port
from redpass.signature import Shape as Shape
from redpass.signature import Signature as Signature
from redpass.signature import check_port as check_port
from redpass.text import line
from redpass.text import op_name as op_name


@dataclass(frozen=True)
class Origin:
    """What a program was made from, so that a result can be written back to the same form.

    Attributes:
        kind: `module`, `huggingface`, `pt2` or `pt`.
        path: the file or folder, or the class of a module in memory.
        task: what the model does, as the source says: `causal-lm`, `encoder`, `classifier`,
            `denoiser` or `unknown`. Decides defaults only, never structure.
        config: the source's own configuration (Hugging Face `config.json`), if it has one.
        parameters: weight name -> parameter name in the source.
        digest: SHA-256 over the source's weights, hex, or "" when the weights are fake.
        notes: what the frontend had to specialise or assume, one sentence each.
    """

    kind: str
    path: str
    task: str = "unknown"
    config: Mapping[str, Any] = field(default_factory=dict)
    parameters: Mapping[str, str] = field(default_factory=dict)
    digest: str = ""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Step:
    """One pass as it was applied: its spec, the keys of its actions and the verdict in words."""

    spec: str
    actions: tuple[str, ...]
    verdict: str
    seconds: float = 0.0


@dataclass(frozen=True, eq=False)
class Lineage:
    """How a program came from the one that was loaded, without the exact rewrites.

    Attributes:
        source: the program as it was loaded.
        plain: `source` with the approximate actions alone: what a form is written from that can
            hold fewer layers and other values, but no rewritten graph. None where an action
            could not be repeated on `source`.
        fault: why `plain` is None, else "".
    """

    source: Program
    plain: Program | None
    fault: str = ""


@dataclass(frozen=True, eq=False)
class Program:
    """A graph in core form with its weights. Compared by identity; never edited in place.

    Attributes:
        lineage: None until an approximate action was applied.
    """

    graph: fx.Graph
    weights: Mapping[str, Tensor]
    signature: Signature
    origin: Origin
    steps: tuple[Step, ...] = ()
    lineage: Lineage | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "weights", MappingProxyType(dict(self.weights)))

    def __repr__(self) -> str:
        """One line; `text` is the whole graph."""
        floats = [(name, w) for name, w in self.weights.items() if w.is_floating_point()]
        counts = {
            name if w.is_meta else w.untyped_storage().data_ptr(): w.numel() for name, w in floats
        }
        name = PurePath(self.origin.path).name
        nodes, parameters = len(self.graph.nodes), sum(counts.values())
        return f"Program({self.origin.kind}, {name}, {nodes} nodes, {parameters:,} parameters)"

    @cached_property
    def nodes(self) -> Mapping[str, fx.Node]:
        """Node name -> node, in graph order."""
        return MappingProxyType({node.name: node for node in self.graph.nodes})

    @cached_property
    def module(self) -> fx.GraphModule:
        """What is run, a `GraphModule`: flat tensors in, flat tuple out. See `RUN_FORMS`."""
        program = self
        for form in RUN_FORMS:
            program = form(program)
        return program.graph_module

    @cached_property
    def graph_module(self) -> fx.GraphModule:
        """A runnable `GraphModule` of a copy of the graph, node by node as it is."""
        root: dict[str, Any] = {
            str(node.target): self.weights[str(node.target)] for node in self.weight_nodes
        }
        graph, _ = copy_graph(self.graph)
        return fx.GraphModule(root, graph)

    @property
    def inputs(self) -> tuple[fx.Node, ...]:
        """The placeholder nodes, in order."""
        return tuple(node for node in self.graph.nodes if node.op == "placeholder")

    @property
    def outputs(self) -> tuple[fx.Node, ...]:
        """The nodes the program returns, in order."""
        return tuple(output_node(self.graph).args[0])  # type: ignore[arg-type]

    @property
    def weight_nodes(self) -> tuple[fx.Node, ...]:
        """The `get_attr` nodes, in order."""
        return tuple(node for node in self.graph.nodes if node.op == "get_attr")

    @property
    def is_fake(self) -> bool:
        """Whether the weights carry no data (traced on the meta device)."""
        return any(tensor.is_meta for tensor in self.weights.values())

    @cached_property
    def text(self) -> str:
        """The graph as text, one line a node: stable, diffable, the form of golden tests."""
        return "\n".join(line(node) for node in self.graph.nodes)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the graph text and signature, hex. Weights' contents are not in it."""
        return hashlib.sha256(f"{self.signature}\n{self.text}".encode()).hexdigest()

    def input_node(self, name: str) -> fx.Node:
        """Returns the placeholder of the input port called `name`. Raises KeyError."""
        names = [port.name for port in self.signature.inputs]
        return dict(zip(names, self.inputs, strict=True))[name]

    def output_value(self, name: str) -> fx.Node:
        """Returns the node whose value is returned as the output port `name`. Raises KeyError."""
        names = [port.name for port in self.signature.outputs]
        return dict(zip(names, self.outputs, strict=True))[name]

    def weight(self, node: fx.Node) -> Tensor | None:
        """Returns the tensor a `get_attr` node reads, or None for any other node."""
        return self.weights[str(node.target)] if node.op == "get_attr" else None

    def __call__(self, *inputs: Tensor, **named: Tensor) -> tuple[Tensor, ...]:
        """Runs the program in eager PyTorch without gradients.

        Args:
            inputs: the inputs in the order of the signature, or give them all by name.

        Raises:
            UsageError: a missing, unknown or ill-typed input; it names the port.
        """
        values = self.bind(inputs, named)
        with torch.no_grad():
            return tuple(self.module(*values))

    def bind(self, inputs: tuple[Tensor, ...], named: Mapping[str, Tensor]) -> list[Tensor]:
        """Orders inputs as the signature does, checking count, names, dtypes and ranks."""
        names = [port.name for port in self.signature.inputs]
        given = dict(zip(names, inputs, strict=False)) | dict(named)
        wrong = [name for name in given if name not in names] + ["?"] * (len(inputs) > len(names))
        missing = [name for name in names if name not in given]
        if wrong or missing:
            raise UsageError(
                f"inputs do not match: missing {missing or 'none'}, unknown {wrong or 'none'}",
                hint=f"expected {', '.join(map(str, self.signature.inputs))}",
            )
        for port in self.signature.inputs:
            check_port(port, given[port.name])
        return [given[name] for name in names]

    def with_steps(self, *steps: Step) -> Program:
        """Returns the same program with `steps` added to its history."""
        return replace(self, steps=self.steps + steps)


RUN_FORMS: list[Callable[[Program], Program]] = []
"""What `Program.module` turns a program into before it is run: ops of our own that run faster as
others are written so. Added to when the ops are registered, never by an import."""


def output_node(graph: fx.Graph) -> fx.Node:
    """Returns the one output node of `graph`."""
    found: fx.Node = next(node for node in reversed(graph.nodes) if node.op == "output")
    return found


def copy_graph(graph: fx.Graph) -> tuple[fx.Graph, dict[fx.Node, fx.Node]]:
    """Copies a graph, keeping names and metadata. Returns the copy and old node -> new node."""
    copy = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    result = copy.graph_copy(graph, mapping)
    out = copy.output(result)
    old = output_node(graph)
    out.meta = dict(old.meta)
    mapping[old] = out
    return copy, mapping


Observer = Callable[[fx.Node, Any], Any]


def interpret(
    program: Program, inputs: Iterable[Tensor], observe: Observer, *, gradients: bool = False
) -> tuple[Tensor, ...]:
    """Runs a program node by node.

    Args:
        observe: called with each node and its value; what it returns is used as the value
            downstream, so return it unchanged to watch and something else to intervene.
        gradients: whether the run is recorded, so that gradients can be asked for behind values
            that `observe` gave `requires_grad`.

    Returns:
        The outputs, in the order of the signature.
    """
    runner = _Interpreter(program, observe)
    with torch.set_grad_enabled(gradients):
        return tuple(runner.run(*inputs))


class _Interpreter(fx.Interpreter):
    def __init__(self, program: Program, observe: Observer) -> None:
        super().__init__(program.graph_module, garbage_collect_values=True)
        self._observe = observe
        self._originals = program.nodes

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        return half_precision.call(target, args, kwargs)

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.op == "output":
            return value
        return self._observe(self._originals[n.name], value)
