"""Running changed programs from their first changed node on.

What a changed program shares with the base is computed once a batch and kept: the residual stream
in front of the change, masks, tables. Many candidates on one base then cost their own part only,
and a base that is replaced by a changed one hands on what both share.
"""

from __future__ import annotations

import weakref
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from redpass.analysis import structure
from redpass.data import Batches
from redpass.fake import is_same_size
from redpass.partial import Part, unchanged
from redpass.program import Program
from redpass.verify.inputs import complete

LIMIT = 1 << 30
"""Bytes of values that are kept over all batches; what does not fit is computed again."""


class Prefix:
    """One output of many changed programs on the same batches.

    Args:
        base: the program that the changed ones are made from.
        batches: the data.
        port: name of the output; "" when only `values` are asked for.
        limit: bytes of values to keep.

    Attributes:
        executed: how many operations were run so far.
        bytes: how many bytes of values are kept.
    """

    def __init__(self, base: Program, batches: Batches, port: str = "", limit: int = LIMIT) -> None:
        self.batches, self.port, self.limit = batches, port, limit
        self.executed = self.bytes = 0
        self._kept: list[dict[str, Any]] = [{} for _ in batches]
        self._tails: weakref.WeakKeyDictionary[Program, dict[tuple[str, ...], Part]]
        self._tails = weakref.WeakKeyDictionary()
        self._use(base)

    def _use(self, base: Program) -> None:
        self.base = base
        self._stream: frozenset[str] | None = None
        self._inputs = [node.name for node in base.inputs]

    def move(self, base: Program) -> None:
        """Makes `base` what later programs are compared with; keeps what is still true of it."""
        same = unchanged(self.base, base) if any(self._kept) else frozenset[str]()
        for number, kept in enumerate(self._kept):
            self._kept[number] = {name: value for name, value in kept.items() if name in same}
        self.bytes = sum(_bytes(value) for kept in self._kept for value in kept.values())
        self._tails.clear()
        self._use(base)

    def output(self, program: Program, number: int) -> Tensor:
        """Returns the output of `program` on batch `number`."""
        name = program.output_value(self.port).name
        value: Tensor = self.values(program, (name,), number)[name]
        return value

    def values(self, program: Program, names: tuple[str, ...], number: int) -> dict[str, Any]:
        """Returns the values of some nodes of `program` on batch `number`."""
        tail = self._tail(program, names)
        given = {**self._given(number, tail.needs), **self._fresh_inputs(program, number, tail)}
        self.executed += tail.calls
        return tail.run(given)

    def _tail(self, program: Program, names: tuple[str, ...]) -> Part:
        """What is left to run of `program`, after all that it shares with the base."""
        tails = self._tails.setdefault(program, {})
        if names not in tails:
            tails[names] = Part(program, names, unchanged(self.base, program))
        return tails[names]

    def _given(self, number: int, needs: Collection[str]) -> dict[str, Any]:
        """The base's values called `needs`: kept ones, and what was missing, now kept."""
        kept = self._kept[number]
        missing = [name for name in needs if name not in kept and name in self.base.nodes]
        if not missing:
            return kept
        start = {**self._input_values(number), **kept}
        part = Part(self.base, missing, start.keys())
        self.executed += part.calls
        if self._stream is None:  # not before: a resumed run moves over many bases and runs none
            self._stream = frozenset(structure(self.base).stream)
        found = part.run(start, keep=self._stream)
        self._keep(kept, found)
        return {**kept, **found}

    def _keep(self, kept: dict[str, Any], found: Mapping[str, Any]) -> None:
        for name, value in found.items():
            if name not in kept and self.bytes + _bytes(value) <= self.limit:
                kept[name] = value
                self.bytes += _bytes(value)

    def _input_values(self, number: int) -> dict[str, Tensor]:
        values = complete(self.base, self.batches[number])
        ports = [port.name for port in self.base.signature.inputs]
        return {node: values[port] for node, port in zip(self._inputs, ports, strict=True)}

    def _fresh_inputs(self, program: Program, number: int, tail: Part) -> dict[str, Tensor]:
        """Inputs of the program that the base has not, or has with other sizes."""
        known = self.base.nodes
        names = {
            node.name
            for node in program.inputs
            if node.name in tail.needs
            and not (node.name in known and is_same_size(*map(_value, (known[node.name], node))))
        }
        if not names:
            return {}
        values = complete(program, self.batches[number])
        pairs = zip(program.inputs, program.signature.inputs, strict=True)
        return {node.name: values[port.name] for node, port in pairs if node.name in names}


def _value(node: fx.Node) -> Any:
    return node.meta.get("val")


def _bytes(value: Any) -> int:
    return value.untyped_storage().nbytes() if isinstance(value, torch.Tensor) else 0
