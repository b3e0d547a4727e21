"""The journal: what was found out is there after any death, and is not worked out again."""

from __future__ import annotations

import errno
import math
import os
import random
from pathlib import Path

import pytest

from redpass import journal as module
from redpass.errors import (
    BudgetError,
    DataError,
    OutputError,
    PassError,
    RedpassError,
    ResourceError,
    VerifyError,
)
from redpass.journal import Journal
from redpass.progress import Silent

FIGURES = {"a": 0.1 + 0.2, "b": [1, None, "\u2028 \n é"], "c": {"x": -0.0, "y": 1e-320}}


def never() -> object:
    raise AssertionError("computed again")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / ".out.journal"


def filled(path: Path, key: str = "work") -> Path:
    """Writes a journal of `FIGURES`, as a run that was killed leaves it; returns its file."""
    journal = Journal.open(path, key)
    for name, value in FIGURES.items():
        journal.recall(name, lambda value=value: value)
    assert journal.path is not None
    return journal.path


def test_figures_are_read_back_and_not_computed(path: Path) -> None:
    filled(path)
    journal = Journal.open(path, "work")
    assert journal.note == "an interrupted run goes on after 3 measurements"
    assert {name: journal.recall(name, never) for name in FIGURES} == FIGURES
    assert math.copysign(1, journal.recall("d", lambda: -0.0)) == -1
    assert (journal.found, journal.recalled, journal.computed) == (3, 3, 1)


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.pi, 5e-324, 2**70, 1 / 3])
def test_numbers_come_back_exactly(path: Path, value: float) -> None:
    first = Journal.open(path, "work").recall("v", lambda: value)
    assert repr(first) == repr(value)
    assert repr(Journal.open(path, "work").recall("v", never)) == repr(value)


def test_nan_comes_back(path: Path) -> None:
    Journal.open(path, "work").recall("v", lambda: math.nan)
    assert math.isnan(Journal.open(path, "work").recall("v", never))


def test_the_first_answer_has_the_form_of_the_later_ones(path: Path) -> None:
    assert Journal.open(path, "work").recall("v", lambda: (1, (2,))) == [1, [2]]
    assert Journal(None).recall("v", lambda: (1, 2)) == [1, 2]


def test_a_name_asked_again_stands_for_the_next_record(path: Path) -> None:
    first = Journal.open(path, "work")
    assert [first.recall("v", lambda n=n: n) for n in (1, 2)] == [1, 2]
    again = Journal.open(path, "work")
    assert [again.recall("v", never), again.recall("v", never)] == [1, 2]
    assert again.recall("v", lambda: 3) == 3


def test_without_a_file_all_is_computed(tmp_path: Path) -> None:
    journal = Journal.open(None, "work")
    assert [journal.recall("v", lambda n=n: n) for n in (1, 2)] == [1, 2]
    journal.remove()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", [DataError, VerifyError])
def test_findings_that_are_errors_are_kept(path: Path, kind: type[RedpassError]) -> None:
    def fail() -> object:
        raise kind("holds NaN", file="data.npz", place="batch 3", hint="leave it out")

    told = []
    for compute in (fail, never):
        with pytest.raises(kind) as caught:
            Journal.open(path, "work").recall("v", compute)
        told.append(str(caught.value))
    assert told[0] == told[1] == "data.npz: batch 3: holds NaN\n  leave it out"


def test_other_errors_are_no_findings(path: Path) -> None:
    def fail() -> object:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        Journal.open(path, "work").recall("v", fail)
    assert Journal.open(path, "work").recall("v", lambda: 1) == 1


def test_what_json_cannot_hold_is_a_mistake_of_the_caller(path: Path) -> None:
    with pytest.raises(TypeError):
        Journal.open(path, "work").recall("v", lambda: {1, 2})
    assert Journal.open(path, "work").found == 0


def test_other_work_has_a_journal_of_its_own(path: Path) -> None:
    filled(path)
    other = Journal.open(path, "other work")
    assert other.found == 0
    assert "nothing to resume" in other.note
    assert Journal.open(path, "work").found == 3


def test_fresh_drops_what_is_there_and_says_so(path: Path) -> None:
    filled(path)
    journal = Journal.open(path, "work", fresh=True)
    assert journal.found == 0
    assert "3 measurements of an interrupted run are dropped" in journal.note
    assert Journal.open(path, "work").found == 0
    assert Journal.open(path, "new", fresh=True).note == ""


def test_the_end_of_a_run_removes_all_journals_of_its_target(path: Path) -> None:
    filled(path), filled(path, "other")
    kept = [path.with_name(name) for name in (".out.journalist", ".out.journal-old", "out")]
    for file in kept:
        file.touch()
    Journal.open(path, "work").remove()
    assert sorted(path.parent.iterdir()) == sorted(kept)


def test_an_empty_journal_can_be_removed_alone(path: Path) -> None:
    file = filled(path)
    Journal.open(path, "work").remove_if_empty()
    assert file.exists()
    Journal.open(path, "other").remove_if_empty()
    assert list(path.parent.iterdir()) == [file]


def test_any_cut_keeps_the_whole_records_before_it(path: Path) -> None:
    file = filled(path)
    data = file.read_bytes()
    ends = [i + 1 for i, byte in enumerate(data) if byte == ord("\n")]
    for size in range(len(data)):
        file.write_bytes(data[:size])
        journal = Journal.open(path, "work")
        assert journal.found == max(0, sum(end <= size for end in ends) - 1)
        assert {
            name: journal.recall(name, lambda n=name: FIGURES[n]) for name in FIGURES
        } == FIGURES
        assert file.read_bytes() == data


def test_any_changed_byte_is_damage(path: Path) -> None:
    file = filled(path)
    data = file.read_bytes()
    generator = random.Random(5)
    for _ in range(300):
        place = generator.randrange(len(data))
        file.write_bytes(data[:place] + bytes([generator.randrange(256)]) + data[place + 1 :])
        changed = file.read_bytes() != data
        journal = Journal.open(path, "work")
        assert journal.found == 3 if not changed else journal.found < 3
        assert {
            name: journal.recall(name, lambda n=name: FIGURES[n]) for name in FIGURES
        } == FIGURES


def test_damage_behind_whole_records_is_told(path: Path) -> None:
    file = filled(path)
    file.write_bytes(file.read_bytes()[:-3])
    assert (
        "goes on after 2 measurements; its journal was damaged" in Journal.open(path, "work").note
    )
    assert "damaged" not in Journal.open(path, "work").note


def test_a_full_disk_is_named_and_leaves_whole_records(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = filled(path)
    before, real = file.read_bytes(), os.write
    journal = Journal.open(path, "work")
    with monkeypatch.context() as patch:
        fault = {"left": 1}

        def once(number: int, data: memoryview) -> int:
            if fault["left"]:
                fault["left"] = 0
                return real(number, data[:5])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        patch.setattr(os, "write", once)
        with pytest.raises(OutputError, match=r"\.out\.journal.*: the disk is full\n  free some"):
            journal.recall("d", lambda: 1)
    assert file.read_bytes() == before


def test_a_link_is_not_followed(path: Path, tmp_path: Path) -> None:
    file = filled(path)
    (tmp_path / "precious").write_text("mine")
    file.unlink()
    file.symlink_to(tmp_path / "precious")
    with pytest.raises(OutputError, match="the journal cannot be kept"):
        Journal.open(path, "work")
    assert (tmp_path / "precious").read_text() == "mine"


@pytest.mark.parametrize(
    "text",
    ["[]", "1", '{"name": 1, "value": 2}', '{"name": "a"}', '{"name": "a", "error": ["X", {}]}',
     '{"name": "a", "error": ["DataError", {"evil": 1}]}', "[" * 100_000,
     '{"name": "a", "error": 3}'],
)  # fmt: skip
def test_lines_that_are_no_records(path: Path, text: str) -> None:
    file = filled(path)
    with file.open("a") as out:
        out.write(f"{module._checksum(text)} {text}\n")
    assert Journal.open(path, "work").found == 3


@pytest.mark.parametrize(
    ("error", "stays"),
    [
        (BudgetError("missed"), False),
        (PassError("nothing to do"), False),
        (DataError("NaN"), False),
        (OutputError("the disk is full"), True),
        (ResourceError("not enough memory"), True),
        (ZeroDivisionError(), True),
        (KeyboardInterrupt(), True),
    ],
)
def test_figures_stay_for_what_the_same_command_may_not_end_in_again(
    path: Path, error: BaseException, stays: bool
) -> None:
    traced = module.traced_of(path)
    traced.write_text("a program")
    with module.cleared_when_done(path):
        pass
    assert not traced.exists(), "nothing stays of a run that went well"
    journal = Journal.open(path, "work", fresh=True)
    traced.write_text("a program")

    def run() -> None:
        with module.cleared_when_done(path), module.kept_until_done(journal, Silent()):
            journal.recall("a", lambda: 1)
            raise error

    with pytest.raises(type(error)):
        run()
    assert traced.exists() == stays
    assert bool(list(path.parent.iterdir())) == stays
    assert any("--resume" in note for note in getattr(error, "__notes__", ())) == stays
