"""`.pt2`: an `ExportedProgram` put together from the graph as it is, without tracing again.

It takes one dict of inputs by public name and returns one of outputs, because names such as
`past_key_values.0.key` are no Python identifiers:
`torch.export.load(path).module()({"input_ids": ids, ...})["logits"]`. The dict's order is that of
the signature: PyTorch checks sizes by position.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import sympy
import torch
from torch import Tensor, fx
from torch.export import ExportedProgram, graph_signature
from torch.export.exported_program import ModuleCallEntry, ModuleCallSignature
from torch.export.graph_signature import InputKind, InputSpec, OutputKind, OutputSpec
from torch.utils import _pytree as pytree
from torch.utils._sympy.numbers import int_oo
from torch.utils._sympy.value_ranges import ValueRanges

from redpass import atomic
from redpass.checks.pt2 import MEMBER
from redpass.codegen.decompose import decompose
from redpass.errors import ExportError
from redpass.export.check import Report, check_outputs, whole_or_gone
from redpass.program import Program, output_node
from redpass.stored import to_text
from redpass.verify.inputs import random_inputs

_USUAL = {"batch": 2, "seq": 5, "past": 3}


def to_pt2(program: Program, path: str | Path) -> Report:
    """Writes `program` as a `.pt2` file and compares what was written with it.

    The file loads without redpass: `redpass::` ops are written as the ATen ops they stand for, as
    which of them pay depends on the device (see `redpass.codegen.lower`). Dimensions keep their
    ranges, so a past length of 0 is accepted.

    Args:
        path: the file; its folder exists. Written to directly, so give a place inside a folder
            that is renamed when whole.

    Raises:
        ExportError: PyTorch cannot hold the program, or what it read back gives other numbers.
    """
    path = Path(path)
    if program.is_fake:
        raise ExportError(
            "the weights carry no data", file=path, hint="load the model without fake=True"
        )
    with whole_or_gone(path):
        loaded = _written(decompose(program), path)

        def run(values: dict[str, Tensor]) -> dict[str, Tensor]:
            with torch.no_grad():
                return dict(loaded(values))

        return check_outputs(program, run, path)


def _written(program: Program, path: Path) -> Any:
    """Writes the file and returns what PyTorch reads back from it."""
    try:
        with atomic.steady(path) as file:  # torch ends the process when a write fails
            extra = {MEMBER: to_text(program)}
            torch.export.save(exported_program(program), file, extra_files=extra)  # type: ignore[arg-type]
        return torch.export.load(path).module()
    except Exception as error:
        first = (str(error).strip().splitlines() or [""])[0]
        raise ExportError(f"torch.export: {type(error).__name__}: {first}", file=path) from error


def exported_program(program: Program) -> ExportedProgram:
    """Returns an `ExportedProgram` that computes what `program` does and shares its weights."""
    graph, moved = _lift(program)
    weights = {moved[node]: str(node.target) for node in program.weight_nodes}
    inputs = [moved[node] for node in program.inputs]
    outputs: Any = output_node(graph).args[0]
    specs = [
        InputSpec(InputKind.BUFFER, _argument(node), name, persistent=True)
        for node, name in weights.items()
    ]
    specs += [InputSpec(InputKind.USER_INPUT, _argument(node), None) for node in inputs]
    results = [OutputSpec(OutputKind.USER_OUTPUT, _argument(node), None) for node in outputs]
    return ExportedProgram(
        torch.nn.Module(),
        graph,
        graph_signature.ExportGraphSignature(specs, results),
        {name: program.weights[name] for name in weights.values()},
        _ranges(program, inputs),
        [_call_entry(program, specs[len(weights) :], results)],
        ((random_inputs(program, _example_sizes(program)),), {}),
    )


def _lift(program: Program) -> tuple[fx.Graph, dict[fx.Node, fx.Node]]:
    """Returns a copy whose first nodes are weights as inputs, then the inputs; old -> new node."""
    graph, moved = fx.Graph(), {}
    for node in program.weight_nodes:
        moved[node] = graph.placeholder("b_" + str(node.target).replace(".", "_"))
        moved[node].meta = dict(node.meta)
    for node in program.inputs:
        moved[node] = graph.node_copy(node)
    for node in program.graph.nodes:
        if node not in moved:
            moved[node] = graph.node_copy(node, lambda old: moved[old])
    return graph, moved


def _argument(node: fx.Node) -> Any:
    if isinstance(node.meta["val"], torch.SymInt):
        return graph_signature.SymIntArgument(node.name)
    return graph_signature.TensorArgument(node.name)


def _ranges(program: Program, inputs: list[fx.Node]) -> dict[sympy.Symbol, ValueRanges[Any]]:
    symbols = {
        symbol
        for node in inputs
        for size in node.meta["val"].shape
        if isinstance(size, torch.SymInt)
        for symbol in size.node.expr.free_symbols
    }
    found = {}
    for symbol in sorted(symbols, key=str):
        low, high = program.signature.dims.get(str(symbol), (0, None))
        found[symbol] = ValueRanges(low, int_oo if high is None else high)
    return found


def _example_sizes(program: Program) -> dict[str, int]:
    return {
        name: max(_USUAL.get(name, 2), low) for name, (low, _) in program.signature.dims.items()
    }


def _call_entry(
    program: Program, inputs: list[InputSpec], outputs: list[OutputSpec]
) -> ModuleCallEntry:
    names = [port.name for port in program.signature.inputs]
    results = [port.name for port in program.signature.outputs]
    return ModuleCallEntry(
        "",
        ModuleCallSignature(
            [spec.arg for spec in inputs],
            [spec.arg for spec in outputs],
            pytree.tree_structure(((dict.fromkeys(names, 0),), {})),
            pytree.tree_structure(dict.fromkeys(results, 0)),
            ["inputs"],
        ),
    )
