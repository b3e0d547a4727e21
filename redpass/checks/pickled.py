"""`.pt` and `.pth`: what a pickle asks for, listed without running it.

A pickle is a program. The names it imports stand in it in plain sight, as long as it uses the
instructions that `torch.save` writes; one that hides them is refused.
"""

from __future__ import annotations

import pickletools
import re
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Collection, Iterable
from pathlib import Path

from redpass.checks import archive
from redpass.checks.pickled_tensors import Player
from redpass.errors import LoadError

AGAIN = "save it again with torch.save"
MAX_PICKLE, MAX_STEPS = 64 << 20, 1_000_000
"""Bytes and instructions of the pickle itself, without the tensors, which lie beside it."""

FUNCTIONS = frozenset(
    f"torch.nn.functional.{name}"
    for name in ("relu", "gelu", "silu", "tanh", "sigmoid", "softmax", "leaky_relu", "elu")
) | {"torch._C._nn.gelu"}
"""Functions that modules of PyTorch keep as attributes."""

_HARMLESS = re.compile(
    r"torch\.nn\.modules\.\w+\.[A-Z_]\w*|torch\.nn\.parameter\.\w+"
    r"|torch\.(cuda\.|sparse\.|cuda\.sparse\.)?[A-Z]\w*(Storage|Tensor)"
    r"|torch\.(Size|Tensor|device|bool|(bfloat|float|complex|uint|int|quint|qint|bits)\d\w*|per_\w+)"
    r"|torch\._utils\._rebuild_\w+|torch\._tensor\._rebuild_\w+|torch\.serialization\._get_layout"
    r"|torch\.storage\.[A-Z]\w*|collections\.(OrderedDict|Counter)|_codecs\.encode"
    r"|builtins\.(set|bytearray|complex)"
)
"""Names that PyTorch may know; whether it does is asked where PyTorch is there."""


def check(path: Path, allow: Collection[str] = ()) -> list[str]:
    """Checks a `.pt` and returns the dotted names its pickle imports.

    Args:
        allow: classes that may be named besides PyTorch's own, as `package.module.Class`.

    Raises:
        LoadError: damaged, TorchScript, an old or hidden pickle, or one that names what neither
            PyTorch nor `allow` can mean.
    """
    if not archive.is_archive(path):
        archive.check_pointer(path)
        raise LoadError(
            "no zip archive: a bare pickle or the format of PyTorch before 1.6",
            file=path,
            hint=f"{AGAIN}; redpass does not run old pickles",
        )
    members = archive.check(path)
    if any(m.filename.split("/")[-1] == "constants.pkl" for m in members):
        raise LoadError("TorchScript, which holds code", file=path, hint="save an nn.Module")
    found = _names(path, members)
    for name in found:
        if name not in allow and name not in FUNCTIONS and not _HARMLESS.fullmatch(name):
            raise not_allowed(name, path)
    return found


def not_allowed(name: str, path: Path) -> LoadError:
    """Returns the error for a name that a pickle may not ask for."""
    return LoadError(
        f"the pickle asks for '{name}', which is not allowed",
        file=path,
        hint=f"if you trust that class, pass --allow {name} (allow=('{name}',)); "
        "--trust-file runs whatever the file says",
    )


def _names(path: Path, members: Iterable[zipfile.ZipInfo]) -> list[str]:
    inside = [m for m in members if m.filename.split("/")[1:] == ["data.pkl"]]
    if len(inside) != 1:
        raise LoadError("no data.pkl: not written by torch.save", file=path, hint=AGAIN)
    place = inside[0].filename
    if inside[0].file_size > MAX_PICKLE:
        found = f"a pickle of {inside[0].file_size} bytes without its tensors"
        raise LoadError(found, file=path, place=place, hint=AGAIN)
    with zipfile.ZipFile(path) as opened:
        data = opened.read(inside[0])
    player = Player()
    try:
        names = list(dict.fromkeys(_imports(data, player, path, place)))
    except LoadError:
        raise
    except Exception as error:  # pickletools fails in many ways on what is no pickle
        found = f"a damaged pickle: {error}"
        raise LoadError(found, file=path, place=place, hint=archive.FETCH) from error
    _check_storages(player, place.rpartition("/")[0], members, path)
    return names


def _check_storages(
    player: Player, home: str, members: Iterable[zipfile.ZipInfo], path: Path
) -> None:
    """Refuses a file that lacks bytes of a tensor."""
    sizes = {member.filename: member.file_size for member in members}
    for key, wanted in player.storages.items():
        name = f"{home}/data/{key}"
        if name not in sizes:
            raise LoadError("a tensor's bytes are missing", file=path, place=name, hint=AGAIN)
        if sizes[name] < wanted:
            found = f"a tensor's bytes are {sizes[name]}, its storage takes {wanted}"
            raise LoadError(found, file=path, place=name, hint=AGAIN)


def _imports(data: bytes, player: Player, path: Path, place: str) -> Iterable[str]:
    for number, (opcode, argument, _) in enumerate(pickletools.genops(data)):
        if number > MAX_STEPS:
            found = f"a pickle of more than {MAX_STEPS} instructions"
            raise LoadError(found, file=path, place=place, hint=AGAIN)
        if opcode.name in ("GLOBAL", "INST"):
            yield _modern(*str(argument).split(" ", 1))
        elif opcode.name in ("STACK_GLOBAL", "EXT1", "EXT2", "EXT4"):
            raise LoadError(
                f"a pickle with {opcode.name}, in which the classes it names cannot be listed",
                file=path,
                place=place,
                hint="save it again with torch.save(model, path) and its own pickle_protocol, "
                "2; or, for a file you made yourself, --trust-file",
            )
        player.play(opcode, argument)


def _modern(module: str, name: str) -> str:
    """Returns the Python 3 name of a global, as the unpickler maps it."""
    module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
    return f"{module}.{name}"
