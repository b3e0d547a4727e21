"""What a failed pass leaves behind: enough to see and repeat the failure without the model."""

from __future__ import annotations

import json
import tempfile
import traceback
from dataclasses import asdict
from pathlib import Path

from redpass.config import Settings
from redpass.program import Program


def write_reproducer(
    program: Program, spec: str, settings: Settings, seed: int, error: Exception
) -> Path:
    """Writes the graph text, the pass spec, the settings, the seed and the traceback.

    Returns:
        The folder, under `settings.dump` when that is set, else under the temporary folder.
    """
    if settings.dump is not None:
        settings.dump.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="redpass-reproducer-", dir=settings.dump))
    facts = {
        "pass": spec,
        "seed": seed,
        "settings": {key: str(value) for key, value in asdict(settings).items()},
        "signature": str(program.signature),
        "origin": program.origin.path,
        "steps": [step.spec for step in program.steps],
        "error": f"{type(error).__name__}: {error}",
    }
    (folder / "reproducer.json").write_text(json.dumps(facts, indent=1))
    (folder / "graph.txt").write_text(program.text + "\n")
    (folder / "traceback.txt").write_text("".join(traceback.format_exception(error)))
    return folder
