"""The rows and columns given for heads are the ones that make and read them, by value."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx
from zoo import BUILDERS, load

from redpass import ops
from redpass.analysis.records import Attention, FeedForward, Projection
from redpass.analysis.structure import structure
from redpass.frontend import random_inputs
from redpass.program import Program, interpret


def values_of(program: Program, names: set[str]) -> dict[str, Tensor]:
    seen: dict[str, Tensor] = {}

    def watch(node: fx.Node, value: Tensor) -> Tensor:
        if node.name in names:
            seen[node.name] = value
        return value

    inputs = random_inputs(program, seed=2)
    interpret(program, [inputs[port.name] for port in program.signature.inputs], watch)
    return seen


def operands(program: Program, attention: Attention) -> tuple[fx.Node, fx.Node]:
    """The value operand of the attention and the node of its weighted sum."""
    node = program.nodes[attention.node]
    if not ops.is_call(node, "softmax"):
        return node.args[2], node  # type: ignore[return-value]
    while not ops.is_call(node, "matmul", "bmm"):
        node = next(user for user in node.users if user.name in attention.nodes)
    return node.args[1], node  # type: ignore[return-value]


def heads_last(value: Tensor, heads: int) -> Tensor:
    """`[..., positions, dim]` as `[batch, heads, positions, dim]`."""
    return value.reshape(-1, heads, *value.shape[-2:])


@pytest.mark.parametrize("name", BUILDERS)
def test_rows_make_the_heads(name: str) -> None:
    program = load(name)
    for attention in structure(program).attentions:
        source, total = operands(program, attention)
        made, read = attention.value, attention.output
        assert made is not None
        assert read is not None
        reader = program.nodes[read.node]
        into = reader.args[1 if ops.is_call(reader, "addmm") else 0]
        assert isinstance(into, fx.Node)
        seen = values_of(program, {source.name, total.name, made.output, into.name})
        check_rows(attention, made, seen[made.output], seen[source.name])
        check_columns(attention, read, seen[into.name], seen[total.name])


def check_rows(attention: Attention, made: Projection, output: Tensor, used: Tensor) -> None:
    heads = used.shape[-3] if used.dim() == 4 else attention.heads
    by_head = heads_last(used, heads)
    features = output.reshape(by_head.shape[0], -1, output.shape[-1])
    new = features.shape[1]
    for head in range(heads):
        kv = attention.key_of_head[head * attention.heads // heads]
        want = features[..., list(made.rows[kv])]
        torch.testing.assert_close(by_head[:, head, -new:], want, rtol=0, atol=0)


def check_columns(attention: Attention, read: Projection, into: Tensor, total: Tensor) -> None:
    by_head = heads_last(total, attention.heads)
    features = into.reshape(by_head.shape[0], -1, into.shape[-1])
    for head in range(attention.heads):
        have = features[..., list(read.rows[head])]
        torch.testing.assert_close(have, by_head[:, head], rtol=0, atol=0)


ACTIVATIONS = {
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    "silu": torch.nn.functional.silu,
    "relu": torch.relu,
}


@pytest.mark.parametrize("name", BUILDERS)
def test_activation_and_gate_make_the_inner_value(name: str) -> None:
    program = load(name)
    for inner in structure(program).feed_forwards:
        names = {inner.inner, inner.up.output} | ({inner.gate.output} if inner.gate else set())
        seen = values_of(program, names)
        have = seen[inner.inner].reshape(-1, inner.width)
        torch.testing.assert_close(have, recomputed(inner, seen), rtol=1e-5, atol=1e-6)


def recomputed(inner: FeedForward, seen: dict[str, Tensor]) -> Tensor:
    def rows(projection: Projection) -> Tensor:
        value = seen[projection.output]
        return value.reshape(-1, value.shape[-1])[:, list(projection.rows[0])]

    act = ACTIVATIONS[inner.activation]
    if inner.gate is None:
        return act(rows(inner.up))
    return act(rows(inner.gate)) * rows(inner.up)
