"""Words of a command are refused before PyTorch is imported, by what the real passes declare."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from redpass.checks import requests
from redpass.errors import UsageError


def test_what_is_read_off_the_sources_is_what_the_passes_are() -> None:
    from redpass.passes import PASSES

    found = {name: (each.options, each.exactness) for name, each in requests.declared().items()}
    assert found == {
        name: (frozenset(field.name for field in dataclasses.fields(kind)), kind.exactness.name)
        for name, kind in PASSES.items()
    }


def test_directions_are_those_of_the_metrics() -> None:
    from redpass.verify.directions import BETTER
    from redpass.verify.metrics import METRICS

    assert {name: metric.better for name, metric in METRICS.items()} == BETTER


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("drop_branchs", "unknown pass 'drop_branchs'"),
        ("drop_branches(kind='x')", "unknown option 'kind'"),
        ("drop_branches('x')", "options are given by name"),
        ("drop_branches(**x)", "options are given by name"),
        ("drop_noops(", "not a list of passes"),
        ("a] + [b", "not a list of passes"),
        ("\0", "not a list of passes"),
        ("(" * 500, "not a list of passes"),
        ("1", "unknown pass '1'"),
    ],
)
def test_wrong_passes(text: str, found: str) -> None:
    with pytest.raises(UsageError, match=found.replace("(", r"\(")) as caught:
        requests.check_passes(text)
    assert caught.value.hint


WRONG = [
    ["--input", "x:float31[batch,2]"],
    ["--passes", "drop_branchs"],
    ["--reduce", "drop_branchs"],
    ["--passes", "drop_branches(kind='x')"],
    ["--budget", "cosin>=0.9"],
    ["--budget", "cosine<=0.9"],
    ["--search", "gready"],
    ["--kernels", "tritn"],
    ["--format", "onxx"],
]


def test_no_word_takes_pytorch_to_be_refused(tmp_path: Path) -> None:
    import torch

    torch.save(torch.nn.Linear(2, 2), tmp_path / "model.pt")
    code = (
        "import sys; from redpass.cli import main\n"
        f"for words in {WRONG!r}:\n"
        "    words = ['optimize', sys.argv[1], '--out', sys.argv[1] + '.out', *words]\n"
        "    assert main(words) == 2, words\n"
        "assert not {'torch', 'numpy', 'transformers'} & sys.modules.keys()\n"
    )
    words = [sys.executable, "-c", code, str(tmp_path / "model.pt")]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("error[usage]") == len(WRONG)
    assert done.stderr.count("did you mean") == len(WRONG) - 1, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt"]
