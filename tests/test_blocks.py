"""Large values beside a journal: there as they were, or not there."""

from __future__ import annotations

import errno
import random
from pathlib import Path

import pytest

from redpass import atomic, blocks, journal
from redpass.blocks import Blocks
from redpass.journal import Journal

VALUES = {"a": b"x" * 1000, "b": b"", "c": bytes(range(256)) * 9}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "values"


def filled(path: Path, key: str = "work") -> Blocks:
    found = Blocks(path, key)
    for name, value in VALUES.items():
        found.keep(name, ["uint8", len(value)], memoryview(value))
    return found


def assert_whole(found: Blocks, names: str = "abc") -> None:
    for name in names:
        assert found.find(name) == (["uint8", len(VALUES[name])], bytearray(VALUES[name]))


def test_values_come_back_at_once_and_after_a_death(path: Path) -> None:
    assert_whole(filled(path))
    again = Blocks(path, "work", fresh=False)
    assert_whole(again)
    again.keep("d", None, memoryview(b"more"))
    assert Blocks(path, "work", fresh=False).find("d") == (None, bytearray(b"more"))


def test_values_of_another_key_or_a_fresh_start_are_not_found(path: Path) -> None:
    filled(path)
    assert Blocks(path, "other", fresh=False).find("a") is None
    assert Blocks(path, "work").find("a") is None
    assert not path.exists()


def test_without_a_path_nothing_is_kept() -> None:
    found = Blocks()
    found.keep("a", None, memoryview(b"x"))
    assert found.find("a") is None


def test_a_damaged_file_gives_the_value_that_was_kept_or_none(path: Path) -> None:
    filled(path)
    whole, chance = path.read_bytes(), random.Random(0)
    missing = 0
    for _ in range(300):
        data = bytearray(whole)
        if chance.random() < 0.5:
            del data[chance.randrange(len(data)) :]
        else:
            for _ in range(chance.randint(1, 3)):
                data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        path.write_bytes(data)
        found = Blocks(path, "work", fresh=False)
        for name, value in VALUES.items():
            kept = found.find(name)
            missing += kept is None
            assert kept is None or kept == (["uint8", len(value)], value)
        found.keep("d", None, memoryview(b"more"))
        assert Blocks(path, "work", fresh=False).find("d") == (None, bytearray(b"more"))
    assert missing > 100


@pytest.mark.parametrize(
    "line", [b"[1]", b"5", b'{"name": 1}', b"[" * 3000, b'{"name": "a", "bytes": -1}', b"\xff\n"]
)
def test_what_is_no_head_ends_the_file(path: Path, line: bytes) -> None:
    filled(path)
    whole = path.read_bytes()
    path.write_bytes(whole + line + b"\n")
    assert_whole(Blocks(path, "work", fresh=False))
    assert path.read_bytes() == whole


def test_a_full_disk_costs_the_values_and_nothing_else(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = filled(path)

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(atomic, "append", full)
    found.keep("d", None, memoryview(b"more"))
    assert not path.exists()
    assert found.find("a") is None


def test_values_are_kept_up_to_a_size(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "LARGEST", 1500)
    found = filled(path)
    assert_whole(found, "ab")
    assert found.find("c") is None


def test_a_link_is_not_followed(path: Path, tmp_path: Path) -> None:
    filled(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    before = (tmp_path / "elsewhere").read_bytes()
    found = Blocks(path, "work", fresh=False)
    found.keep("d", None, memoryview(b"more"))
    assert found.find("a") is None
    assert (tmp_path / "elsewhere").read_bytes() == before


def test_a_journal_opens_them_and_takes_them_along(path: Path) -> None:
    first = Journal.open(path, "work")
    first.recall("figure", lambda: 1)
    first.blocks.keep("a", None, memoryview(b"x"))
    assert Journal.open(path, "work").blocks.find("a") is not None
    assert Journal.open(path, "other").blocks.find("a") is None
    assert len(list(path.parent.iterdir())) == 3
    journal.remove_all(path)
    assert list(path.parent.iterdir()) == []


def test_a_journal_without_figures_leaves_none(path: Path) -> None:
    opened = Journal.open(path, "work")
    opened.blocks.keep("a", None, memoryview(b"x"))
    opened.remove_if_empty()
    assert list(path.parent.iterdir()) == []


def test_what_is_said_about_a_value_is_as_safe_as_its_bytes(path: Path) -> None:
    filled(path)
    whole = path.read_bytes()
    said = f'"about": ["uint8", {len(VALUES["c"])}]'.encode()
    assert whole.count(said) == 1
    path.write_bytes(whole.replace(said, said.replace(b"uint8", b"uint9")))
    assert Blocks(path, "work", fresh=False).find("c") is None
