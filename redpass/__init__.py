"""redpass: a compiler for the redundancy in trained neural networks."""

from __future__ import annotations

import importlib
from typing import Any

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
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'redpass' has no attribute '{name}'")
    module = importlib.import_module(_HOMES[name])
    return module if _HOMES[name] == f"{__name__}.{name}" else getattr(module, name)


def __dir__() -> list[str]:
    return [*_HOMES, "__version__"]
