"""Checks a zip archive before PyTorch opens it.

Two readers of one archive may disagree on what is in it; the checks leave only archives on
which all agree: one directory at the very end, plain relative names, each once, sums that fit.
"""

from __future__ import annotations

import zipfile
from pathlib import Path, PurePosixPath

from redpass.errors import LoadError

POINTER = b"version https://git-lfs"
END, LOCAL = b"PK\x05\x06", b"PK\x03\x04"
MAX_MEMBERS = 200_000
MAX_RATIO = 20
FETCH = "fetch or save the file again"
ODD = "no program that writes models makes such an archive: do not trust it, save it again"


def check(path: Path) -> list[zipfile.ZipInfo]:
    """Checks the archive at `path` and returns its members.

    Raises:
        LoadError: no zip archive, damaged, or with names, sizes or members no writer makes.
    """
    _check_ends(path)
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            _check_members(members, path)
            bad = archive.testzip()
    except LoadError:
        raise
    except Exception as error:
        raise LoadError(f"a damaged archive: {error}", file=path, hint=FETCH) from error
    if bad is not None:
        raise LoadError("a member's checksum does not fit", file=path, place=bad, hint=FETCH)
    return members


def file_size(path: Path, hint: str) -> int:
    """Returns the bytes of a plain file. Raises `LoadError`, with `hint` when it is not there."""
    try:
        size = path.stat().st_size
    except FileNotFoundError as error:
        text = "a link to a file that is not there" if path.is_symlink() else "no such file"
        raise LoadError(text, file=path, hint=hint) from error
    except OSError as error:
        found, hint = f"cannot be read: {error.strerror}", "check its permissions and links"
        raise LoadError(found, file=path, hint=hint) from error
    if not path.is_file():
        raise LoadError("is no file", file=path, hint=hint)
    return size


def is_archive(path: Path) -> bool:
    """Whether the file starts like a zip archive."""
    with path.open("rb") as file:
        return file.read(4) == LOCAL


def check_pointer(path: Path) -> None:
    """Refuses the line of text that git-lfs leaves in place of a file it has not fetched."""
    with path.open("rb") as file:
        if file.read(len(POINTER)) == POINTER:
            raise LoadError("a git-lfs pointer, not the file", file=path, hint="run `git lfs pull`")


def _check_ends(path: Path) -> None:
    check_pointer(path)
    with path.open("rb") as file:
        start = file.read(len(LOCAL))
        size = file.seek(0, 2)
        file.seek(max(0, size - 22))
        tail = file.read()
    if start != LOCAL or tail[:4] != END or tail[20:] != b"\0\0":
        raise LoadError("no whole zip archive: truncated, or not one", file=path, hint=FETCH)


def _check_members(members: list[zipfile.ZipInfo], path: Path) -> None:
    seen: set[str] = set()
    if len(members) > MAX_MEMBERS:
        raise LoadError(f"{len(members)} members", file=path, hint=ODD)
    for member in members:
        name = member.filename
        parts = PurePosixPath(name).parts
        if name.startswith("/") or "\\" in name or ".." in parts or name != member.orig_filename:
            raise LoadError("a member's name leaves the archive", file=path, place=name, hint=ODD)
        if name.casefold() in seen:
            raise LoadError("a member occurs twice", file=path, place=name, hint=ODD)
        seen.add(name.casefold())
        if member.flag_bits & 1:
            raise LoadError("a member is encrypted", file=path, place=name, hint=ODD)
        if member.file_size > MAX_RATIO * max(member.compress_size, 1024):
            raise LoadError(
                f"a member of {member.compress_size} bytes claims {member.file_size}",
                file=path,
                place=name,
                hint=ODD,
            )
