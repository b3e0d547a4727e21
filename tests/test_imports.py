"""What may import what, how long things may get, and what may happen at import time."""

from __future__ import annotations

import ast
import importlib
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import redpass

ROOT = Path(redpass.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))

LAYERS = (
    {
        "errors",
        "config",
        "record",
        "progress",
        "atomic",
        "manifest",
        "artifact",
        "journal",
        "blocks",
    },
    {"checks"},
    {
        "text",
        "half_precision",
        "kept_tensors",
        "signature",
        "program",
        "ops",
        "data",
        "plan",
        "partial",
        "state",
        "stored",
        "graph_json",
        "fake",
        "fingerprint",
        "cuts",
    },
    {"rewrite", "lineage", "facts", "analysis", "verify", "reproducer"},
    {"passes", "codegen"},
    {
        "engine",
        "lowering",
        "recipe",
        "budget",
        "summary",
        "pipeline",
        "trial",
        "frontend",
        "export",
        "runtime",
        "bench",
    },
    {"report", "cli"},
)
"""Low to high: a module imports from its own layer and those before it."""

LONGEST_FILE, LONGEST_PASS, LONGEST_FUNCTION, MEDIAN_FUNCTION = 300, 150, 60, 12


def part(file: Path) -> str:
    """The file or folder right under `redpass/` that `file` belongs to."""
    return file.relative_to(ROOT).parts[0].removesuffix(".py")


def layer(name: str) -> int:
    return next(number for number, names in enumerate(LAYERS) if name in names)


def imported(file: Path) -> Iterator[tuple[str, int]]:
    """The parts of redpass that a file imports, anywhere in it, with line numbers.

    What only a type checker reads makes no dependency.
    """
    for node in executed(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            root, _, rest = name.partition(".")
            if root == "redpass" and rest and not hasattr(redpass, f"__{rest.strip('_')}__"):
                yield rest.partition(".")[0], node.lineno


def executed(tree: ast.AST) -> Iterator[ast.AST]:
    yield tree
    for child in ast.iter_child_nodes(tree):
        test = child.test if isinstance(child, ast.If) else None
        if not (isinstance(test, ast.Name) and test.id == "TYPE_CHECKING"):
            yield from executed(child)


def functions(file: Path) -> Iterator[tuple[str, int]]:
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not is_kernel(node):
            assert node.end_lineno is not None
            yield f"{file.relative_to(ROOT)}:{node.name}", node.end_lineno - node.lineno + 1


def is_kernel(node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Whether a function is compiled by Triton: kernels are long, one argument a line."""
    return any(ast.unparse(decorator) == "triton.jit" for decorator in node.decorator_list)


def test_every_part_has_its_layer() -> None:
    known = set().union(*LAYERS)
    assert {part(file) for file in FILES} - {"__init__", "__main__"} <= known


def test_imports_go_down() -> None:
    wrong = [
        f"{file.relative_to(ROOT)}:{line} imports {name}"
        for file in FILES
        if part(file) not in ("__init__", "__main__")
        for name, line in imported(file)
        if layer(name) > layer(part(file))
    ]
    assert wrong == []


def test_passes_and_codegen_do_not_know_each_other() -> None:
    pairs = {("passes", "codegen"), ("codegen", "passes")}
    assert not [f for f in FILES for name, _ in imported(f) if (part(f), name) in pairs]


def test_the_check_sees_an_upward_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    file = tmp_path / "errors.py"
    file.write_text("def f():\n    from redpass import cli\n    import redpass.report.page\n")
    assert list(imported(file)) == [("cli", 2), ("report", 3)]


def test_no_relative_imports() -> None:
    wrong = [
        f"{file.relative_to(ROOT)}:{node.lineno}"
        for file in FILES
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.ImportFrom) and node.level
    ]
    assert wrong == []


def test_environment_is_read_in_one_place() -> None:
    wrong = [
        str(file.relative_to(ROOT))
        for file in FILES
        if file.name != "config.py"
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv")
    ]
    assert wrong == []


def test_files_are_short() -> None:
    lengths = {file.relative_to(ROOT): len(file.read_text().splitlines()) for file in FILES}
    limits = {name: LONGEST_PASS if name.parts[0] == "passes" else LONGEST_FILE for name in lengths}
    assert {str(n): length for n, length in lengths.items() if length > limits[n]} == {}


def test_functions_are_short() -> None:
    lengths = dict(item for file in FILES for item in functions(file))
    assert {name: length for name, length in lengths.items() if length > LONGEST_FUNCTION} == {}
    assert statistics.median(lengths.values()) < MEDIAN_FUNCTION


def third_parties(code: str) -> set[str]:
    """The packages beside Python's own that a fresh interpreter imports for `code`."""
    listing = (
        "; import sys; print(sorted({name.partition('.')[0] for name, module in "
        "sys.modules.items() if '-packages' in (getattr(module, '__file__', None) or '')}))"
    )

    def loaded(text: str) -> set[str]:
        words = [sys.executable, "-c", text + listing]
        found = subprocess.run(words, capture_output=True, text=True, check=True)
        return set(ast.literal_eval(found.stdout.splitlines()[-1]))

    return loaded(code) - loaded("pass") - {"redpass"}


def test_import_loads_nothing_else() -> None:
    assert third_parties("import redpass") == set()


FOR_HELP = {
    "typer", "rich", "click", "markdown_it", "mdurl", "pygments", "shellingham", "colorama",
    "typing_extensions", "annotated_doc", "annotated_types", "pydantic", "pydantic_core",
    "typing_inspection",
}  # fmt: skip
"""What typer needs to show a help page; benchmarks/startup.py has the times."""


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["optimize", "--help"]])
def test_help_loads_what_shows_it(arguments: list[str]) -> None:
    code = f"from redpass.cli import main; assert main({arguments!r}) == 0"
    assert third_parties(code) <= FOR_HELP


@pytest.mark.parametrize("name", redpass.__all__)
def test_every_public_name_is_there_at_first_use(name: str) -> None:
    code = f"import redpass; assert redpass.{name}.__name__.split('.')[-1] == {name!r}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_type_checkers_are_told_what_the_public_names_are() -> None:
    source = ast.parse((ROOT / "__init__.py").read_text())
    told = next(node for node in source.body if isinstance(node, ast.If))
    homes = {
        alias.name: node.module
        for node in told.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert sorted(homes) == sorted(redpass.__all__) == sorted(redpass._HOMES)
    for name, home in homes.items():
        assert getattr(importlib.import_module(home), name) is getattr(redpass, name)
