"""Ways to damage a file: bits, cuts, swaps, and edits that keep the container whole."""

from __future__ import annotations

import copy
import io
import json
import random
import zipfile
from collections.abc import Callable, Iterator
from typing import Any

ODD = (
    None, True, -1, 0, 1, 3, 2**31, 2**63, -(2**63), 10**30, 0.5, 1e308, float("inf"), float("nan"),
    "", "x", "\x00", "\x1b[31m", "../../etc/passwd", "__import__('os')", "A" * 5000, "float32", [],
    {}, [[]], [1, 2, 3], {"a": 1}, "torch.ops.aten.add.Tensor", "silu",
)  # fmt: skip
"""Values to put where another is expected."""


def damage(data: bytes, chance: random.Random) -> bytes:
    """Returns `data` with one to four changes of its bytes."""
    for _ in range(chance.choice((1, 1, 2, 4))):
        data = chance.choice(BYTES)(data, chance)
    return data


def _flip(data: bytes, chance: random.Random) -> bytes:
    result = bytearray(data)
    for _ in range(min(len(result), chance.choice((1, 1, 2, 8)))):
        result[chance.randrange(len(result))] ^= 1 << chance.randrange(8)
    return bytes(result)


def _cut(data: bytes, chance: random.Random) -> bytes:
    return data[: chance.randrange(len(data) + 1)]


def _drop(data: bytes, chance: random.Random) -> bytes:
    start = chance.randrange(len(data) + 1)
    return data[:start] + data[start + chance.choice((1, 2, 7, 64, 512)) :]


def _swap(data: bytes, chance: random.Random) -> bytes:
    size = min(chance.choice((1, 4, 16, 128)), len(data) // 2)
    first = chance.randrange(max(1, len(data) - 2 * size + 1))
    second = chance.randrange(first + size, max(first + size + 1, len(data) - size + 1))
    between = data[first + size : second]
    return (
        data[:first] + data[second : second + size] + between + data[first : first + size]
        + data[second + size :]
    )  # fmt: skip


def _repeat(data: bytes, chance: random.Random) -> bytes:
    start = chance.randrange(len(data) + 1)
    return data[:start] + data[start : start + chance.choice((1, 8, 64, 512))] + data[start:]


def _fill(data: bytes, chance: random.Random) -> bytes:
    start, size = chance.randrange(len(data) + 1), chance.choice((1, 4, 8, 32))
    filler = chance.choice((b"\x00", b"\xff", b"[", b'"', chance.randbytes(1)))
    return data[:start] + filler * size + data[start + size :]


BYTES: tuple[Callable[[bytes, random.Random], bytes], ...] = (
    _flip, _flip, _cut, _drop, _swap, _repeat, _fill,
)  # fmt: skip


def edit_json(text: bytes, chance: random.Random) -> bytes:
    """Returns JSON text with one to three values changed, moved, renamed or removed."""
    value = json.loads(text)
    for _ in range(chance.choice((1, 1, 1, 3))):
        value = _edit(value, chance)
    return json.dumps(value).encode()


def _edit(value: Any, chance: random.Random) -> Any:
    places = list(_places(value))
    if not places:
        return copy.deepcopy(chance.choice(ODD))
    holder, key = chance.choice(places)
    how = chance.randrange(6)
    if how <= 2:
        holder[key] = copy.deepcopy(chance.choice(ODD))
    elif how == 3:
        del holder[key]
    elif how == 4:
        other, name = chance.choice(places)
        if _has(holder, key) and _has(other, name):
            holder[key] = copy.deepcopy(other[name])
    elif isinstance(holder, dict):
        holder[str(key) + "x"] = holder.pop(key)
    else:
        holder.append(holder[key])
    return value


def _has(holder: Any, key: Any) -> bool:
    return key in holder if isinstance(holder, dict) else key < len(holder)


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(value, dict | list):
        for key, part in list(value.items() if isinstance(value, dict) else enumerate(value)):
            yield value, key
            yield from _places(part)


def edit_member(data: bytes, chance: random.Random) -> bytes:
    """Returns a zip archive with one member damaged, dropped or copied, and fitting checksums."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = [(info.filename, archive.read(info)) for info in archive.infolist()]
    number = chance.randrange(len(members))
    name, content = members[number]
    if chance.random() < 0.1:
        del members[number]
    elif chance.random() < 0.1:
        members[number] = (name, chance.choice(members)[1])
    else:
        members[number] = (name, _edit_content(name, content, chance))
    result = io.BytesIO()
    with zipfile.ZipFile(result, "w") as archive:
        for name, content in members:
            archive.writestr(name, content)
    return result.getvalue()


def _edit_content(name: str, content: bytes, chance: random.Random) -> bytes:
    if name.endswith(".json") and chance.random() < 0.8:
        return edit_json(content, chance)
    return damage(content, chance)


def edit_safetensors(data: bytes, chance: random.Random) -> bytes:
    """Returns a safetensors file with its header edited and the header's length put right."""
    size = int.from_bytes(data[:8], "little")
    header = edit_json(data[8 : 8 + size], chance)
    return len(header).to_bytes(8, "little") + header + data[8 + size :]
