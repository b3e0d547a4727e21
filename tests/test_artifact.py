"""The one writer: whatever fails at whatever moment, the target is the old or the new, whole."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from redpass import artifact, atomic, manifest
from redpass.errors import LoadError, OutputError

CALLS = ("open", "write", "fsync", "rename", "mkdir", "unlink")
"""The calls of the operating system that the writer makes through `os`."""


def write_version(target: Path, word: str, *, force: bool = False) -> None:
    with artifact.staged(target, force=force) as folder:
        (folder / "model").mkdir()
        (folder / "model" / "weights.bin").write_bytes(word.encode() * 1000)
        (folder / "plan.json").write_text(word)


def write_half(target: Path, error: BaseException, name: str = "plan.json") -> None:
    with artifact.staged(target, force=True) as folder:
        (folder / name).write_text("half")
        if isinstance(error, OSError):
            error.filename = str(folder / name)
        raise error


def version_of(target: Path) -> str:
    """The version at `target`, after checking that it is whole."""
    manifest.verify_artifact(target)
    word = (target / "plan.json").read_text()
    assert (target / "model" / "weights.bin").read_bytes() == word.encode() * 1000
    return word


def attempt(target: Path) -> str:
    """Writes a new version; returns the message when that is refused."""
    try:
        write_version(target, "new", force=True)
    except OutputError as error:
        return str(error)
    return ""


def hidden(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))


@pytest.fixture
def target(tmp_path: Path) -> Path:
    """A place that already holds a good artifact."""
    write_version(tmp_path / "result", "old")
    return tmp_path / "result"


class Faults:
    """Lets the system's call number `at` fail with `code`, counted over all of `CALLS`."""

    def __init__(self, patch: pytest.MonkeyPatch, at: int, code: int) -> None:
        self.count, self.at, self.code, self.hit = 0, at, code, ""
        for name in CALLS:
            patch.setattr(os, name, self.wrap(name, getattr(os, name)))
        patch.setattr(atomic, "_renameat2", self.wrap("rename", atomic._renameat2))

    def wrap(self, name: str, real: Callable[..., object]) -> Callable[..., object]:
        def call(*args: object, **kwargs: object) -> object:
            self.count += 1
            if self.count != self.at:
                return real(*args, **kwargs)
            self.hit = name
            raise OSError(self.code, os.strerror(self.code))

        return call


@pytest.fixture
def fast_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sweep writes hundreds of artifacts; none has to outlive a power cut."""
    monkeypatch.setattr(os, "fsync", lambda number: None)


@pytest.mark.usefixtures("fast_sync")
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_fault_at_every_call_leaves_old_or_new_whole(tmp_path: Path, code: int) -> None:
    finished, hits = False, set()
    for at in range(1, 200):
        place = tmp_path / str(at)
        place.mkdir()
        write_version(place / "result", "old")
        with pytest.MonkeyPatch.context() as patch:
            faults = Faults(patch, at, code)
            message = attempt(place / "result")
        assert message == "" or (str(place) in message and "\n  " in message)
        finished = faults.hit == ""
        hits.add(faults.hit)
        assert version_of(place / "result") in ("old", "new")
        write_version(place / "result", "next", force=True)
        assert version_of(place / "result") == "next"
        assert hidden(place) == []
        if finished:
            break
    assert finished
    assert hits >= {"open", "write", "fsync", "rename", "mkdir"}


@pytest.mark.usefixtures("fast_sync")
def test_fault_at_every_call_without_the_swap(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(atomic, "_system_call", lambda: None)
    for at in range(1, 60):
        place = tmp_path / str(at)
        place.mkdir()
        write_version(place / "result", "old")
        with pytest.MonkeyPatch.context() as patch:
            Faults(patch, at, errno.ENOSPC)
            attempt(place / "result")
        assert version_of(place / "result") in ("old", "new")


def test_death_between_the_two_moves_is_mended(
    target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    aside = target.with_name(f".{target.name}.previous-1-abcd")
    os.rename(target, aside)
    write_version(target.with_name("other"), "unrelated")
    assert not target.exists()
    artifact.remove_leftovers(target, alone=True)
    assert version_of(target) == "old"
    assert hidden(target.parent) == []


def test_error_in_the_block_leaves_the_target_untouched(target: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        write_half(target, ZeroDivisionError())
    assert version_of(target) == "old"
    assert hidden(target.parent) == []


def test_interrupt_removes_everything_that_was_made(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        write_half(tmp_path / "a" / "b" / "c", KeyboardInterrupt())
    assert list(tmp_path.iterdir()) == []


def test_full_disk_is_named(tmp_path: Path) -> None:
    target = tmp_path / "result"
    with pytest.raises(OutputError, match="the disk is full") as caught:
        write_half(target, OSError(errno.ENOSPC, "No space left on device"), "model.onnx")
    assert caught.value.file == str(target / "model.onnx"), "as it would have been called"
    with pytest.raises(OutputError, match="the disk is full"), artifact.staged(target):
        raise RuntimeError("writer failed: No space left on device (os error 28)")
    assert list(tmp_path.iterdir()) == []


def test_other_errors_of_the_block_pass_through(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), artifact.staged(tmp_path / "result"):
        (tmp_path / "data.npz").read_bytes()


def _limited(target: Path, limit: int) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        write_version(target, "new", force=True)
    except OutputError:
        os._exit(8)
    os._exit(0)


def test_every_size_limit_on_files_is_a_clean_error(target: Path) -> None:
    codes = set()
    for limit in (0, 1, 2, 3, 100, 250, 1000, 2999, 3000, 100_000):
        worker = multiprocessing.get_context("fork").Process(target=_limited, args=(target, limit))
        worker.start()
        worker.join()
        codes.add(worker.exitcode)
        assert version_of(target) == ("new" if worker.exitcode == 0 else "old")
        assert hidden(target.parent) == []
    assert codes == {0, 8}


def _write_for_ever(target: Path) -> None:
    for number in range(10_000):
        write_version(target, f"version {number} ", force=True)


def test_kill_at_random_moments_leaves_a_whole_artifact(target: Path) -> None:
    generator = random.Random(7)
    for _ in range(12):
        worker = multiprocessing.get_context("fork").Process(target=_write_for_ever, args=(target,))
        worker.start()
        time.sleep(generator.uniform(0.01, 0.12))
        assert worker.pid is not None
        os.kill(worker.pid, signal.SIGKILL)
        worker.join()
        assert version_of(target)
    write_version(target, "after", force=True)
    assert version_of(target) == "after"
    assert hidden(target.parent) == []


def _hold(target: Path, started: object) -> None:
    with artifact.staged(target):
        started.set()  # type: ignore[attr-defined]
        time.sleep(60)


def test_two_runs_to_one_target(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    started = context.Event()
    worker = context.Process(target=_hold, args=(tmp_path / "result", started))
    worker.start()
    started.wait()
    with pytest.raises(OutputError, match="another run is writing here"):
        write_version(tmp_path / "result", "second")
    assert len(hidden(tmp_path)) == 2, "the first run's folder and lock are untouched"
    worker.kill()
    worker.join()
    write_version(tmp_path / "result", "third")
    assert version_of(tmp_path / "result") == "third"
    assert hidden(tmp_path) == []


def test_abandon_all_removes_what_is_being_written(tmp_path: Path) -> None:
    with artifact.staged(tmp_path / "result") as folder:
        (folder / "plan.json").write_text("half")
        artifact.abandon_all()
        assert hidden(tmp_path) == []
        folder.mkdir()  # so that the block can end
    assert (tmp_path / "result").is_dir()


def test_existing_target_needs_force(target: Path) -> None:
    with pytest.raises(OutputError, match="exists already") as caught:
        write_version(target, "new")
    assert "--force" in str(caught.value)
    write_version(target, "new", force=True)
    assert version_of(target) == "new"


def test_force_spares_what_redpass_did_not_write(target: Path, tmp_path: Path) -> None:
    (target / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"notes\.txt: holds a file that redpass did not write"):
        write_version(target, "new", force=True)
    home = tmp_path / "home"
    home.mkdir()
    (home / "thesis.tex").write_text("mine")
    with pytest.raises(OutputError, match="was not written by redpass"):
        write_version(home, "new", force=True)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OutputError, match="is a file, not a folder"):
        write_version(tmp_path / "file", "new", force=True)


def test_targets_that_cannot_be(tmp_path: Path) -> None:
    model = tmp_path / "models" / "model"
    model.mkdir(parents=True)
    with pytest.raises(OutputError, match="is the input itself"):
        artifact.check_target(model, model, force=True)
    with pytest.raises(OutputError, match="holds the input"):
        artifact.check_target(tmp_path / "models", model, force=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="is a file, not a folder"):
        artifact.check_target(tmp_path / "file" / "result")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(OutputError, match="links form a loop"):
        artifact.check_target(tmp_path / "loop" / "result")
    with pytest.raises(OutputError, match="has no parent folder"):
        artifact.check_target(Path("/"), force=True)


def test_link_to_the_input_is_the_input(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "model")
    with pytest.raises(OutputError, match="is the input itself"):
        artifact.check_target(tmp_path / "link", tmp_path / "model", force=True)


def test_folder_that_is_not_writable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(OutputError, match="is not writable"):
        artifact.check_target(tmp_path / "result")


@pytest.mark.parametrize(
    ("code", "words"),
    [(errno.EROFS, "the disk is read-only"), (errno.EPERM, "cannot be written: Operation not")],
)
def test_a_folder_that_takes_nothing_is_told_before_any_work(
    code: int, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: object, *_: object) -> None:
        raise OSError(code, os.strerror(code), str(path))

    monkeypatch.setattr(os, "mkdir", refuse)
    for target in (tmp_path / "result", tmp_path / "a" / "b" / "result"):
        with pytest.raises(OutputError, match=f"result: {words}"):
            artifact.check_target(target)


def test_parents_that_cannot_be_made_are_told(tmp_path: Path) -> None:
    long = tmp_path / "a" / ("x" * 300)
    with pytest.raises(OutputError, match="cannot be written: File name too long"):
        write_version(long / "result", "new")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(OutputError, match="cannot be resolved: File name too long"):
        artifact.check_target(tmp_path / ("x" * 300))


def test_name_that_is_too_long(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="cannot be written: File name too long"):
        write_version(tmp_path / ("x" * 250), "new")
    assert list(tmp_path.iterdir()) == []


def write_two_files(target: Path) -> None:
    with artifact.staged_file(target, force=True) as path:
        path.write_text("three")
        path.with_name("model.onnx.data").write_text("more")


def test_single_file(tmp_path: Path) -> None:
    target = tmp_path / "model.onnx"
    with artifact.staged_file(target) as path:
        assert path.name == "model.onnx"
        path.write_text("one")
    assert target.read_text() == "one"
    with pytest.raises(OutputError, match="exists already"), artifact.staged_file(target):
        pass
    with artifact.staged_file(target, force=True) as path:
        path.write_text("two")
    assert target.read_text() == "two"
    with pytest.raises(OutputError, match="2 files"):
        write_two_files(target)
    assert target.read_text() == "two"
    assert hidden(tmp_path) == []


def test_single_file_over_a_folder(target: Path) -> None:
    with pytest.raises(OutputError, match="is a folder"), artifact.staged_file(target, force=True):
        pass


def test_links_are_refused(tmp_path: Path) -> None:
    with (
        pytest.raises(OutputError, match="a link cannot be part"),
        artifact.staged(tmp_path / "result") as folder,
    ):
        (folder / "secret").symlink_to("/etc/passwd")


@pytest.fixture(params=["cut", "changed", "missing", "foreign"])
def damage(request: pytest.FixtureRequest, target: Path) -> Iterator[str]:
    """What is wrong with the artifact at `target`, as the message says it."""
    path = target / "model" / "weights.bin"
    if request.param == "cut":
        path.write_bytes(path.read_bytes()[:-1])
        yield "has 2999 bytes, the manifest says 3000"
    elif request.param == "changed":
        path.write_bytes(b"x" + path.read_bytes()[1:])
        yield "its SHA-256 is not the one in the manifest"
    elif request.param == "missing":
        path.unlink()
        yield "a file of the artifact is missing"
    else:
        path.with_name("extra").write_text("")
        yield "is not in the manifest"


def test_damage_is_found_and_named(target: Path, damage: str) -> None:
    with pytest.raises(LoadError, match=damage) as caught:
        manifest.verify_artifact(target)
    assert str(target / "model") in str(caught.value)


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"format": "other", "files": {}}', "[" * 100_000, '{"format": 1, "files": 2}',
     '{"format": "redpass-artifact-1", "files": {"a": {"bytes": "x"}}}'],
)  # fmt: skip
def test_manifest_that_is_none(tmp_path: Path, text: str) -> None:
    (tmp_path / manifest.NAME).write_text(text)
    with pytest.raises(LoadError, match="is not a manifest"):
        manifest.read_manifest(tmp_path)


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "a/../../b"])
def test_manifest_that_leaves_its_folder(tmp_path: Path, name: str) -> None:
    files = {name: {"bytes": 0, "sha256": ""}}
    text = json.dumps({"format": manifest.FORMAT, "files": files})
    (tmp_path / manifest.NAME).write_text(text)
    with pytest.raises(LoadError, match="a path leaves the folder"):
        manifest.read_manifest(tmp_path)


def test_same_content_same_manifest(tmp_path: Path) -> None:
    write_version(tmp_path / "a", "one")
    write_version(tmp_path / "b", "one")
    first, second = (tmp_path / name / manifest.NAME for name in "ab")
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(os, "geteuid") or os.geteuid() != 0,
    reason="mounting a small disk needs root on Linux",
)
def test_disk_that_is_really_full(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("this system does not let root mount")
    try:
        write_version(disk / "result", "old")
        with (
            pytest.raises(OutputError, match="the disk is full"),
            artifact.staged(disk / "result", force=True) as folder,
        ):
            (folder / "big").write_bytes(bytes(1 << 20))
        assert version_of(disk / "result") == "old"
        assert hidden(disk) == []
    finally:
        subprocess.run(["umount", str(disk)], check=True)


class Broken:
    """A file whose disk is full after `room` bytes."""

    def __init__(self, room: int) -> None:
        self.room, self.content = room, b""

    def write(self, data: bytes) -> int:
        if not self.room:
            raise OSError(errno.ENOSPC, "No space left on device")
        part = bytes(data[: self.room])
        self.room -= len(part)
        self.content += part
        return len(part)


def test_steady_file_keeps_the_first_failure_for_the_end() -> None:
    broken = Broken(5)
    steady = atomic._Steady(broken)  # type: ignore[arg-type]
    assert [steady.write(b"abc"), steady.write(b"defg"), steady.write(b"h")] == [3, 4, 1]
    assert (broken.content, steady.tell()) == (b"abcde", 8)
    assert steady.failure is not None
    assert steady.failure.errno == errno.ENOSPC


def _save_large(path: Path) -> None:
    import torch

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
    try:
        with atomic.steady(path) as file:
            torch.save({"w": torch.zeros(10_000)}, file)
    except OSError as error:
        os._exit(8 if error.errno == errno.EFBIG and error.filename == str(path) else 1)
    os._exit(0)


def test_native_writer_survives_a_full_disk(tmp_path: Path) -> None:
    worker = multiprocessing.get_context("fork").Process(target=_save_large, args=(tmp_path / "w",))
    worker.start()
    worker.join()
    assert worker.exitcode == 8


def test_steady_file_holds_what_was_written(tmp_path: Path) -> None:
    import torch

    with atomic.steady(tmp_path / "w.pt") as file:
        torch.save({"w": torch.arange(1000)}, file)
    assert torch.equal(torch.load(tmp_path / "w.pt", weights_only=True)["w"], torch.arange(1000))
