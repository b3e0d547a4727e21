"""The one door: a file or folder that the user names as a model, before anything large happens."""

from __future__ import annotations

import errno
from collections.abc import Collection
from pathlib import Path

from redpass.checks import folder, pickled, pt2
from redpass.errors import LoadError

KINDS = "give a Hugging Face folder, a .pt2, a .pt or a .pth"


def check(path: Path, *, allow: Collection[str] = (), trust: bool = False) -> None:
    """Refuses what redpass would refuse to load, as far as that can be told without PyTorch.

    Args:
        allow: classes a pickle may name besides PyTorch's own.
        trust: whether the file may hold what redpass cannot check.

    Raises:
        LoadError: with the file, the place in it, what was found and what to do.
    """
    existing(path)
    if path.is_dir():
        folder.check(path)
    elif path.suffix == ".pt2":
        if not trust:
            pt2.check(path)
    elif path.suffix in (".pt", ".pth"):
        if not trust:
            pickled.check(path, allow)
    else:
        raise unknown(path)


def existing(path: Path) -> Path:
    """Returns `path` when it can be read. Raises `LoadError`."""
    try:
        path.stat()
        if path.is_file():
            with path.open("rb") as file:
                if not file.read(1):
                    raise LoadError("is empty", file=path, hint="fetch the file again")
        elif not path.is_dir():
            raise LoadError("is neither a file nor a folder", file=path, hint=KINDS)
    except OSError as error:
        missing = error.errno in (errno.ENOENT, errno.ENOTDIR)
        text = "no such file or folder" if missing else f"cannot be read: {error.strerror}"
        raise LoadError(text, file=path, hint=KINDS) from error
    return path


def unknown(path: Path) -> LoadError:
    """Returns the error for a file whose name ends in nothing that redpass reads."""
    weights = path.suffix == ".safetensors"
    hint = "give the folder that holds config.json and the weights" if weights else KINDS
    text = f"'{path.suffix}' is no model format"
    return LoadError("weights without a configuration" if weights else text, file=path, hint=hint)
