"""The documents' Python examples run, in order, each file in one namespace."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"```python\n(.*?)```", re.DOTALL)


def blocks(name: str) -> list[str]:
    return BLOCK.findall((ROOT / name).read_text())


SAID = {
    "README.md": "applied drop_branches.similar:layers.",
    "docs/writing-a-pass.md": "applied drop_double_negation.pair",
}
"""What each file's examples print, among other things."""


@pytest.mark.parametrize("name", SAID)
def test_examples_run(name, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    found = blocks(name)
    assert found
    namespace: dict[str, object] = {"__name__": "example"}
    for block in found:
        exec(compile(block, name, "exec"), namespace)
    assert SAID[name] in capsys.readouterr().out


def test_every_file_the_architecture_names_exists():
    text = (ROOT / "ARCHITECTURE.md").read_text()
    named = set(re.findall(r"`(redpass/[\w/.]+|tests/[\w/.]+)`", text))
    assert named
    assert {path for path in named if not (ROOT / path).exists()} == set()


def test_docs_name_every_environment_variable():
    from redpass.config import Settings

    text = (ROOT / "docs/options.md").read_text()
    for field in Settings.__dataclass_fields__:
        assert f"`REDPASS_{field.upper()}`" in text


def test_docs_name_every_kind_of_error_with_its_exit_code():
    from redpass import errors

    text = (ROOT / "docs/errors.md").read_text()
    kinds = [kind for kind in vars(errors).values() if hasattr(kind, "exit_code")]
    assert len(kinds) > 10
    for kind in set(kinds) - {errors.RedpassError}:
        assert f"| `{kind.code}` | {kind.exit_code} | `{kind.__name__}` |" in text
