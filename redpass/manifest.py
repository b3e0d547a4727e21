"""What an artifact says it holds: every file with its size and SHA-256, written last."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from redpass import atomic
from redpass.errors import LoadError, OutputError

NAME = "manifest.json"
FORMAT = "redpass-artifact-1"


@dataclass(frozen=True)
class Entry:
    """One file of an artifact: its size in bytes and its SHA-256, hex."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What an artifact holds: path relative to its folder -> entry."""

    files: Mapping[str, Entry]


def write_manifest(folder: Path) -> Manifest:
    """Syncs every file of `folder` to the disk and writes the manifest over them, itself synced.

    Raises:
        OutputError: a link is among the files.
        OSError: the disk is full or fails.
    """
    entries: dict[str, Entry] = {}
    for path in sorted(files_of(folder)):
        if path.is_symlink():
            raise OutputError("a link cannot be part of an artifact", file=path)
        atomic.sync(path)
        name = path.relative_to(folder).as_posix()
        entries[name] = Entry(path.stat().st_size, digest(path))
    files = {name: asdict(entry) for name, entry in entries.items()}
    atomic.write(folder / NAME, json.dumps({"format": FORMAT, "files": files}, indent=1) + "\n")
    for path in (*(p for p in folder.rglob("*") if p.is_dir()), folder):
        atomic.sync(path)
    return Manifest(entries)


def read_manifest(folder: Path) -> Manifest:
    """Reads the manifest of an artifact.

    Raises:
        LoadError: there is none, it is damaged, or it names a file outside the folder.
    """
    path = folder / NAME
    hint = "give a folder that redpass wrote"
    try:
        data = json.loads(path.read_bytes())
        if data["format"] != FORMAT:
            raise ValueError(f"its format is {data['format']!r}, not {FORMAT!r}")
        files = data["files"]
        entries = {str(k): Entry(_size(v["bytes"]), str(v["sha256"])) for k, v in files.items()}
    except OSError as error:
        raise LoadError("holds no readable manifest", file=folder, hint=hint) from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise LoadError(f"is not a manifest: {error}", file=path, hint=hint) from error
    for name in entries:
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise LoadError("a path leaves the folder", file=path, place=name, hint=hint)
    return Manifest(entries)


def _size(value: object) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r} is no size")
    return value


def verify_artifact(folder: Path) -> Manifest:
    """Checks size and SHA-256 of every file of an artifact.

    Raises:
        LoadError: names the first file that is missing, foreign, or differs.
    """
    manifest = read_manifest(folder)
    hint = "the artifact is damaged; write it again"
    for name, entry in manifest.files.items():
        path = folder / name
        if not path.is_file():
            raise LoadError("a file of the artifact is missing", file=path, hint=hint)
        size = path.stat().st_size
        if size != entry.bytes:
            text = f"has {size} bytes, the manifest says {entry.bytes}"
            raise LoadError(text, file=path, hint=hint)
        if digest(path) != entry.sha256:
            raise LoadError("its SHA-256 is not the one in the manifest", file=path, hint=hint)
    unknown = foreign_files(folder, manifest)
    if unknown:
        raise LoadError("is not in the manifest", file=folder / unknown[0], hint=hint)
    return manifest


def foreign_files(folder: Path, manifest: Manifest) -> list[str]:
    """Returns the files of `folder` that its manifest does not list."""
    known = {NAME, *manifest.files}
    names = (path.relative_to(folder).as_posix() for path in files_of(folder))
    return sorted(name for name in names if name not in known)


def files_of(folder: Path) -> Iterator[Path]:
    """Yields every file and link under `folder`."""
    return (path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())


def digest(path: Path) -> str:
    """Returns the SHA-256 of a file's content, hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
