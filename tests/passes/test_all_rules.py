"""Every rule of every exact pass fires in some golden case, and every skip reason occurs in one.

How a pass file is read: its rules are the strings `"<pass>.<rule>"` in it; its skip reasons are the
third arguments of `Skip(...)` and what functions called `_why_not...` return, when these are
strings or f-strings (each constant piece of an f-string must occur).
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import redpass.passes

FOLDER = Path(redpass.passes.__file__).parent
GOLDEN = Path(__file__).parent / "golden"
OTHERS = {
    "__init__", "spec", "depth", "drop_branches", "refit_projections", "map_stream",
    "factor_linears", "shrink_heads", "prune_channels", "cache_latents", "drop_key_channels",
    "heads", "caches", "cluster_heads", "prune_heads", "merge_key_value_heads", "slice_stream",
}  # fmt: skip
NAMES = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem not in OTHERS)


@pytest.mark.parametrize("name", NAMES)
def test_every_rule_fires_and_every_skip_reason_occurs(name: str) -> None:
    source = (FOLDER / f"{name}.py").read_text()
    golden = "\n".join(path.read_text() for path in sorted((GOLDEN / name).glob("*.txt")))
    fired = "\n".join(line for line in golden.splitlines() if line.startswith("action "))
    skipped = "\n".join(line for line in golden.splitlines() if line.startswith("skip "))
    rules = set(re.findall(rf'"({name}\.[a-z_]+)"', source))
    assert rules, f"{name} names no rules"
    silent = [rule for rule in rules if f"action {rule}:" not in fired]
    assert not silent, f"never fired: {silent}"
    missing = [piece for piece in _reasons(ast.parse(source)) if piece not in skipped]
    assert not missing, f"never occurred: {missing}"


def _reasons(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Call)
            and getattr(node.func, "id", "") == "Skip"
            and len(node.args) > 2
        ):
            yield from _pieces(node.args[2])
        elif isinstance(node, ast.FunctionDef) and node.name.startswith("_why_not"):
            for inner in ast.walk(node):
                if isinstance(inner, ast.Return) and inner.value is not None:
                    yield from _pieces(inner.value)


def _pieces(value: ast.expr) -> Iterator[str]:
    if isinstance(value, ast.Constant) and isinstance(value.value, str):
        yield value.value
    elif isinstance(value, ast.JoinedStr):
        for part in value.values:
            if isinstance(part, ast.Constant):
                yield str(part.value)
    elif isinstance(value, ast.IfExp):
        yield from _pieces(value.body)
        yield from _pieces(value.orelse)
