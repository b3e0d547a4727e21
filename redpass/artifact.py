"""The one writer of everything that is saved: whole and checked, or not there at all.

Work goes to a hidden folder beside the target. When it is complete, every file is synced, a
manifest with sizes and SHA-256 is written last, and one rename puts it in place. Whatever fails
before that instant leaves the target as it was; what a killed run left behind, the next removes.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from redpass import atomic
from redpass.errors import LoadError, OutputError
from redpass.manifest import files_of, foreign_files, read_manifest, write_manifest

_TROUBLE = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file is larger than this disk allows",
    errno.EIO: "the disk fails",
    errno.EROFS: "the disk is read-only",
}
_LIVE: set[Path] = set()


def check_target(path: Path, source: Path | None = None, *, force: bool = False) -> Path:
    """Refuses, before any long work, a place where the result could not be written.

    Args:
        path: the folder or file that is to be written.
        source: the model it is made from, which must not be overwritten.
        force: whether an older result of redpass may be replaced.

    Returns:
        The absolute path, symbolic links followed.

    Raises:
        OutputError: it exists, its parent cannot be written, or it is or holds the input.
    """
    target = _resolve(path)
    if source is not None:
        _check_apart(target, _resolve(source))
    parent = _nearest_folder(target)
    if not os.access(parent, os.W_OK | os.X_OK):
        raise OutputError("the folder is not writable", file=parent, hint="choose another --out")
    if os.path.lexists(target) and not force:
        raise OutputError("exists already", file=target, hint="choose another --out, or --force")
    _try_out(parent, target)
    return target


@contextlib.contextmanager
def staged(target: Path, *, source: Path | None = None, force: bool = False) -> Iterator[Path]:
    """Yields an empty hidden folder that becomes `target` when the block ends without an error.

    Raises:
        OutputError: see `check_target`; or another run writes there, or the disk is full.
    """
    final = check_target(target, source, force=force)
    if os.path.lexists(final):
        _check_replaceable(final)
    with _workspace(final) as folder:
        yield folder
        write_manifest(folder)
        _publish(folder, final, force)


@contextlib.contextmanager
def staged_file(target: Path, *, source: Path | None = None, force: bool = False) -> Iterator[Path]:
    """Yields a hidden path, named like `target`, whose file becomes `target` at the end.

    Raises:
        OutputError: see `staged`; or more than the one file was written.
    """
    final = check_target(target, source, force=force)
    if final.is_dir():
        raise OutputError("is a folder", file=final, hint="name a file, or leave out the suffix")
    with _workspace(final) as folder:
        yield folder / final.name
        found = sorted(str(path.relative_to(folder)) for path in files_of(folder))
        if found != [final.name]:
            text = f"the result is {len(found)} files ({', '.join(found)}), not one"
            raise OutputError(text, file=final, hint="name a folder instead of a file")
        atomic.sync(folder / final.name)
        _publish(folder / final.name, final, force)


def remove_leftovers(target: Path, *, alone: bool = False) -> None:
    """Removes what killed runs left beside `target`, and puts back what they had moved aside.

    Args:
        alone: whether the caller holds the lock of `target`; without it, what belongs to a
            process that still runs stays.
    """
    for path in target.parent.glob(f".{_escaped(target.name)}.previous-*"):
        atomic.restore(target, path)
        _remove(path)
    for path in target.parent.glob(f".{_escaped(target.name)}.partial-*"):
        if alone or not _is_alive(path):
            _remove(path)


def journal_of(target: Path) -> Path:
    """Returns the stem of the names under which a run that writes `target` keeps its journal."""
    final = _resolve(target)
    return final.with_name(f".{final.name}.journal")


def abandon_all() -> None:
    """Removes what this process is still writing; for an exit that cannot wait for `finally`."""
    for final in list(_LIVE):
        remove_leftovers(final)
        _lock_of(final).unlink(missing_ok=True)


@contextlib.contextmanager
def _workspace(final: Path) -> Iterator[Path]:
    """Yields a fresh hidden folder beside `final`, gone at the end whatever happens."""
    folder = final.with_name(f".{final.name}.partial-{os.getpid()}-{secrets.token_hex(4)}")
    made = [path for path in (final.parent, *final.parent.parents) if not path.exists()]
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        with atomic.lock(_lock_of(final), final) as alone:
            remove_leftovers(final, alone=alone)
            _LIVE.add(final)
            try:
                folder.mkdir()
                yield folder
                made.clear()
            finally:
                _remove(folder)
                _LIVE.discard(final)
    except OutputError:
        raise
    except Exception as error:
        _explain(error, final)
        raise
    finally:
        _drop_empty(made)


def _explain(error: Exception, final: Path) -> None:
    """Raises `OutputError` in place of an error that comes from the disk."""
    number = getattr(error, "errno", None)
    words = [text for code, text in _TROUBLE.items() if _says(error, code)]
    file = _shown(getattr(error, "filename", None) or getattr(error, "file", None), final)
    hint = "free some space or choose another --out; nothing was changed"
    if words:
        raise OutputError(words[0], file=file, hint=hint) from error
    place = str(getattr(error, "filename", ""))
    if number is not None and (f".{final.name}." in place or Path(place) in final.parents):
        text = f"cannot be written: {os.strerror(number)}"
        raise OutputError(text, file=file, hint="choose another --out") from error


def _shown(file: object | None, final: Path) -> Path:
    """The name a file would have had at the target, whatever it is called while hidden."""
    _, hidden, rest = str(file).partition(f"/.{final.name}.partial-")
    inside = rest.partition("/")[2]
    return final / inside if hidden and inside and inside != final.name else final


def _says(error: Exception, code: int) -> bool:
    """Whether an error has the system's `code`; a full disk is also known by its words.

    Libraries that write on their own report it as text in an error of another kind.
    """
    if getattr(error, "errno", None) == code:
        return True
    return code == errno.ENOSPC and os.strerror(code).lower() in str(error).lower()


def _publish(new: Path, final: Path, force: bool) -> None:
    """Puts `new` at `final` at one instant and removes what was there."""
    if force and os.path.lexists(final):
        aside = final.with_name(f".{final.name}.previous-{os.getpid()}-{secrets.token_hex(4)}")
        old = atomic.swap(new, final, aside)
        atomic.sync(final.parent)
        _remove(old)
    else:
        atomic.move_in(new, final)
        atomic.sync(final.parent)


def _check_replaceable(final: Path) -> None:
    """Refuses to replace, even with --force, a folder that holds more than an artifact."""
    hint = "remove it yourself, or choose another --out"
    if not final.is_dir():
        raise OutputError("is a file, not a folder", file=final, hint=hint)
    if not any(final.iterdir()):
        return
    try:
        foreign = foreign_files(final, read_manifest(final))
    except LoadError:
        raise OutputError("was not written by redpass", file=final, hint=hint) from None
    if foreign:
        text = "holds a file that redpass did not write"
        raise OutputError(text, file=final, place=foreign[0], hint=hint)


def _lock_of(final: Path) -> Path:
    return final.with_name(f".{final.name}.lock")


def _check_apart(target: Path, source: Path) -> None:
    hint = "choose an --out outside the input"
    if target == source:
        raise OutputError("is the input itself", file=target, hint=hint)
    if target in source.parents:
        raise OutputError("holds the input", file=target, hint=hint)


def _resolve(path: Path) -> Path:
    try:
        given = path.expanduser().absolute()
        for part in (given, *given.parents):
            if part.is_symlink() and not part.exists():
                part.resolve()  # a loop is told as one
                hint = "make what it points to, or choose another path"
                raise OutputError("is a link to a place that is not there", file=part, hint=hint)
        return given.resolve()
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop, before Python 3.13
        number = getattr(error, "errno", None) or errno.ELOOP
        why = "links form a loop" if number == errno.ELOOP else os.strerror(number)
        hint = "choose another path"
        raise OutputError(f"cannot be resolved: {why}", file=path, hint=hint) from error


def _nearest_folder(target: Path) -> Path:
    for parent in target.parents:
        if parent.is_dir():
            return parent
        if os.path.lexists(parent):
            hint = "choose another --out"
            raise OutputError("is a file, not a folder", file=parent, hint=hint)
    raise OutputError("has no parent folder", file=target, hint="choose another --out")


def _try_out(parent: Path, target: Path) -> None:
    """Makes a folder and removes it again: rights alone do not tell what a filesystem takes."""
    first = [target, *target.parents][len(target.parents) - len(parent.parents) - 1]
    folder = parent / f".{first.name}.partial-{os.getpid()}-{secrets.token_hex(4)}"
    try:
        folder.mkdir()
        folder.rmdir()
    except OSError as error:
        why = _TROUBLE.get(error.errno or 0, f"cannot be written: {os.strerror(error.errno or 0)}")
        raise OutputError(why, file=target, hint="choose another --out") from error


def _drop_empty(folders: list[Path]) -> None:
    """Removes the folders that were made for a target that never came to be."""
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.rmdir()


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _is_alive(path: Path) -> bool:
    """Whether the process that made a hidden folder still runs."""
    number = path.name.rpartition(".partial-")[2].partition("-")[0]
    if not number.isdigit() or int(number) == os.getpid():
        return False
    try:
        os.kill(int(number), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _escaped(name: str) -> str:
    """Makes a file name safe inside a glob pattern."""
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)
