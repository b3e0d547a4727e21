"""Which bytes a pickle of `torch.save` asks for: its storages, found without running it.

A storage is a persistent id, the tuple `("storage", type, key, place, elements)`. The pickle's
stack is played with plain values only; whatever it would call or build is one opaque value.
"""

from __future__ import annotations

import pickletools
from dataclasses import dataclass, field
from typing import Any

_WIDTHS = {
    "Double": 8, "Float": 4, "Half": 2, "BFloat16": 2, "Long": 8, "Int": 4, "Short": 2, "Char": 1,
    "Byte": 1, "Bool": 1, "ComplexDouble": 16, "ComplexFloat": 8, "Untyped": 1, "QInt8": 1,
    "QUInt8": 1, "QInt32": 4,
}  # fmt: skip
"""Bytes of an element by the name of the storage's class."""

_PLAIN = frozenset(
    {"BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "UNICODE", "BININT", "BININT1", "BININT2",
     "INT", "LONG", "LONG1", "LONG4", "GLOBAL"}
)  # fmt: skip
_TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_PUTS = frozenset({"BINPUT", "LONG_BINPUT", "PUT"})
_GETS = frozenset({"BINGET", "LONG_BINGET", "GET"})
_MARK, _OPAQUE = object(), object()


def _effect(opcode: pickletools.OpcodeInfo) -> tuple[bool, int, int]:
    """Whether an instruction takes all down to a mark, what it takes beside that, what it puts."""
    names = [each.name for each in opcode.stack_before]
    pops = names.index("mark") if "mark" in names else len(names)
    return "mark" in names, pops, len(opcode.stack_after)


_EFFECTS = {opcode.name: _effect(opcode) for opcode in pickletools.opcodes}
_OTHERS = frozenset(_EFFECTS) - (
    _PLAIN | _PUTS | _GETS | {*_TUPLES, "MARK", "TUPLE", "BINPERSID", "MEMOIZE"}
)


@dataclass
class Player:
    """The stack of a pickle, instruction by instruction.

    Attributes:
        storages: key -> the bytes that the largest storage of that name takes.
    """

    storages: dict[str, int] = field(default_factory=dict)
    _stack: list[Any] = field(default_factory=list)
    _memo: dict[int, Any] = field(default_factory=dict)

    def play(self, opcode: pickletools.OpcodeInfo, argument: Any) -> None:
        """Plays one instruction. Raises IndexError, KeyError, ValueError on what no pickle does."""
        name, stack = opcode.name, self._stack
        if name in _OTHERS:
            self._other(name)
        elif name in _PLAIN:
            stack.append(argument)
        elif name in _PUTS:
            self._memo[int(argument)] = stack[-1]
        elif name == "MEMOIZE":
            self._memo[len(self._memo)] = stack[-1]
        elif name in _GETS:
            stack.append(self._memo[int(argument)])
        elif name == "MARK":
            stack.append(_MARK)
        elif name == "TUPLE":
            stack.append(self._to_mark())
        elif name in _TUPLES:
            stack.append(self._pop(_TUPLES[name]))
        elif name == "BINPERSID":
            self._ask(stack.pop())
            stack.append(_OPAQUE)

    def _other(self, name: str) -> None:
        """Takes off and puts on as many values as the instruction says, all of them opaque."""
        is_marked, pops, pushes = _EFFECTS[name]
        if is_marked:
            self._to_mark()
        if pops > len(self._stack):
            raise IndexError(f"{name} with nothing to work on")
        if pops:
            del self._stack[-pops:]
        self._stack += (_OPAQUE,) * pushes

    def _pop(self, count: int) -> tuple[Any, ...]:
        found = tuple(self._stack.pop() for _ in range(count))
        return found[::-1]

    def _to_mark(self) -> tuple[Any, ...]:
        found = []
        while (value := self._stack.pop()) is not _MARK:
            found.append(value)
        return tuple(found[::-1])

    def _ask(self, wanted: Any) -> None:
        if not (isinstance(wanted, tuple) and len(wanted) == 5 and wanted[0] == "storage"):
            return
        _, kind, key, _, elements = wanted
        width = _WIDTHS.get(str(kind).rpartition(" ")[2].removesuffix("Storage"), 1)
        if not isinstance(key, str) or type(elements) is not int or elements < 0:
            raise ValueError("a storage without a name and a size")
        self.storages[key] = max(self.storages.get(key, 0), elements * width)
