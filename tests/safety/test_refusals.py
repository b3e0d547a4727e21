"""Each crafted file is refused with file, reason and next step, before PyTorch, running nothing."""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import crafted
import pytest

from redpass.checks import source
from redpass.errors import LoadError
from redpass.frontend import load


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> crafted.Good:
    folder = tmp_path_factory.mktemp("good")
    return crafted.good(folder, folder / "canary")


@pytest.mark.parametrize("name", crafted.CASES)
def test_it_is_refused(name: str, good: crafted.Good, tmp_path: Path) -> None:
    make, reason = crafted.CASES[name]
    path = make(good, tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(LoadError) as caught:
        source.check(path)
    error = caught.value
    assert re.search(reason, error.found + f" {error.place} {error.file}"), error
    assert error.file is not None
    assert error.file.startswith(str(path))
    assert error.hint
    assert sorted(tmp_path.rglob("*")) == before
    assert not good.canary.exists()


def test_the_good_ones_are_not(good: crafted.Good) -> None:
    for path in (good.pt, good.pt2, good.folder):
        source.check(path)


def test_refusing_needs_no_torch(good: crafted.Good, tmp_path: Path) -> None:
    code = (
        "import sys\nfrom pathlib import Path\nfrom redpass.checks import source\n"
        "from redpass.errors import LoadError\n"
        "for path in sys.argv[1:]:\n"
        "    try:\n        source.check(Path(path))\n    except LoadError:\n        pass\n"
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)\n"
    )
    made = []
    for number, (make, _) in enumerate(crafted.CASES.values()):
        (tmp_path / str(number)).mkdir()
        made.append(str(make(good, tmp_path / str(number))))
    done = subprocess.run([sys.executable, "-c", code, *made], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_names_that_pytorch_allows_are_not_refused_before_it_is_asked() -> None:
    from torch import _weights_only_unpickler as unpickler
    from torch import nn

    from redpass.checks import pickled

    classes = [kind for kind in vars(nn.modules).values() if inspect.isclass(kind)]
    names = {f"{kind.__module__}.{kind.__qualname__}" for kind in classes}
    for name in names | set(unpickler._get_allowed_globals()):
        assert pickled._HARMLESS.fullmatch(name), name


def test_the_schema_is_the_one_pytorch_reads_by() -> None:
    from torch._export.serde import schema

    from redpass.checks import pt2_schema

    found = pt2_schema.installed()
    assert set(found.records) >= {pt2_schema.ROOT, pt2_schema.WEIGHTS}
    for name, record in found.records.items():
        kind = getattr(schema, name)
        assert {field.name for field in dataclasses.fields(kind)} == record.fields.keys()
        assert record.is_union == issubclass(kind, schema._Union)
    for name, numbers in found.numbers.items():
        assert {value.value for value in getattr(schema, name)} == numbers


def test_without_a_schema_nothing_is_refused_for_its_types() -> None:
    from redpass.checks import pt2_schema

    assert pt2_schema.fault([], pt2_schema.ROOT, pt2_schema.Schema({}, {})) == ("", "")
    assert pt2_schema.fault([], pt2_schema.ROOT) == ("", "[] is no object")


def test_a_folder_as_the_cache_of_the_hub_lays_it_out(good: crafted.Good, tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(good.folder.iterdir())):
        shutil.copy(file, blobs / f"{number:040x}")
        (snapshot / file.name).symlink_to(Path("../../blobs") / f"{number:040x}")
    source.check(snapshot)
    assert load(snapshot).origin.digest == load(good.folder).origin.digest


def test_private_keys_and_code_of_a_folder_do_nothing(good: crafted.Good, tmp_path: Path) -> None:
    folder = shutil.copytree(good.folder, tmp_path / "model")
    (folder / "evil.py").write_text(f"import os\nos.mkdir({str(good.canary)!r})\n")
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "auto_map": {"AutoModel": "evil.Model", "AutoConfig": "evil.Config"},
        "_attn_implementation": "somebody/kernel",
        "_name_or_path": "/etc",
        "attn_implementation": "somebody/kernel",
        "trust_remote_code": True,
    }
    (folder / "config.json").write_text(json.dumps(config))
    program = load(folder)
    assert any("auto_map" in note for note in program.origin.notes)
    assert not good.canary.exists()


def test_trust_lets_a_pt2_be_read_without_checks(
    good: crafted.Good, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from redpass import trial

    path = crafted.rezip(good.pt2, tmp_path / "m.pt2", lambda _, d: d, {"good/extra/note": b"x"})
    with pytest.raises(LoadError, match="no plain export"):
        load(path)
    monkeypatch.setattr(trial, "check", lambda *_: pytest.fail("a child was asked"))
    assert load(path, trust_file=True).signature.inputs


HOSTILE = {
    "crash": "import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)",
    "loop": "while True: pass",
    "memory": "x = []\nwhile True: x.append(bytearray(1 << 24))",
    "exit": "import os\nos._exit(0)",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_whatever_the_child_does_ends_with_it(
    name: str, good: crafted.Good, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that makes PyTorch's reader misbehave, played by a reader that does."""
    from redpass import trial

    code = (
        "import sys; sys.path[:] = {path!r}\n"
        "import torch.export\nfrom redpass import trial\n"
        "trial.SECONDS, trial.MEMORY = 1, 1 << 28\n"
        f"torch.export.load = lambda _: exec({HOSTILE[name]!r})\ntrial.serve()"
    )
    trial._Helper.drop()
    monkeypatch.setattr(trial, "_CODE", code)
    try:
        for _ in range(2 if name == "exit" else 1):  # the helper outlives its workers
            with pytest.raises(LoadError, match=r"torch\.export\.load refuses it"):
                load(good.pt2)
        helper = trial._Helper._current
        assert helper is not None
        assert helper.process.poll() is None
    finally:
        trial._Helper.drop()


def test_a_helper_that_died_is_replaced(good: crafted.Good) -> None:
    from redpass import trial

    load(good.pt2)
    helper = trial._Helper._current
    assert helper is not None
    os.kill(helper.process.pid, 9)
    helper.process.wait()
    with pytest.raises(LoadError, match="the process that read it ended"):
        load(good.pt2)
    assert load(good.pt2).signature.inputs
