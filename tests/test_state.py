"""Numbering of cache entries after some were dropped, and the sizes they gave."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from redpass.program import Origin, Port, Program, Signature
from redpass.state import renumber_state


def ports(names, layers):
    stems = {"past": "past_key_values", "present": "present"}
    return [
        Port(f"{stems[names]}.{i}.{part}", torch.float32, ("batch", 2, names, 4))
        for i in layers
        for part in ("key", "value")
    ]


def program(layers):
    inputs, outputs = ports("past", layers), ports("present", layers)
    pairs = tuple((a.name, b.name) for a, b in zip(inputs, outputs, strict=True))
    ids = Port("input_ids", torch.int64, ("batch", "seq"))
    signature = Signature((ids, *inputs), tuple(outputs), pairs)
    return Program(torch.fx.Graph(), {}, signature, Origin("module", "built by a test"))


@pytest.mark.parametrize(
    ("layers", "left"), [((0, 2, 5), (0, 1, 2)), ((1,), (0,)), ((10, 9), (1, 0))]
)
def test_entries_are_counted_without_gaps(layers, left):
    after = renumber_state(program(layers)).signature
    names = [port.name for port in after.inputs[1:]]
    assert names == [f"past_key_values.{i}.{part}" for i in left for part in ("key", "value")]
    assert after.state == tuple((n, n.replace("past_key_values", "present")) for n in names)
    assert [port.name for port in after.outputs] == [output for _, output in after.state]
    assert after.inputs[0].name == "input_ids"


def test_entries_without_a_gap_stay_as_they_are():
    before = program((0, 1, 2))
    assert renumber_state(before) is before


def test_names_that_are_not_numbered_stay():
    before = program((3,))
    signature = before.signature
    odd = Port("memory", torch.float32, (4,))
    out = Port("memory_out", torch.float32, (4,))
    signature = replace(
        signature,
        inputs=(*signature.inputs, odd),
        outputs=(*signature.outputs, out),
        state=(*signature.state, ("memory", "memory_out")),
    )
    changed = replace(before, signature=signature)
    assert renumber_state(changed) is changed
