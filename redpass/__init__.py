"""redpass: a compiler for the redundancy in trained neural networks."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # what `__getattr__` gives, for editors and type checkers
    from redpass import export
    from redpass.analysis.structure import structure
    from redpass.data import Batches, Splits, split
    from redpass.errors import RedpassError
    from redpass.frontend.batches import read_batches
    from redpass.frontend.load import load
    from redpass.lowering import lower
    from redpass.pipeline import optimize
    from redpass.program import Program

__version__ = "0.1.0"

_HOMES = {
    "Program": "redpass.program",
    "Batches": "redpass.data",
    "Splits": "redpass.data",
    "split": "redpass.data",
    "RedpassError": "redpass.errors",
    "load": "redpass.frontend",
    "read_batches": "redpass.frontend",
    "optimize": "redpass.pipeline",
    "lower": "redpass.lowering",
    "structure": "redpass.analysis",
    "export": "redpass.export",
}
__all__ = [
    "Batches", "Program", "RedpassError", "Splits", "export", "load", "lower", "optimize",
    "read_batches", "split", "structure",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'redpass' has no attribute '{name}'")
    module = importlib.import_module(_HOMES[name])
    return module if _HOMES[name] == f"{__name__}.{name}" else getattr(module, name)


def __dir__() -> list[str]:
    return [*_HOMES, "__version__"]
