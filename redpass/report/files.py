"""The files of a report: `report.html`, `report.json` and the recipe `plan.json`."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from redpass.errors import LoadError
from redpass.record import RunRecord, from_json


def write_report(record: RunRecord, folder: Path) -> None:
    """Writes the report and the recipe of a run into `folder`. Raises OSError."""
    from redpass.report.page import render  # charts and template: no other command starts with them

    (folder / "report.html").write_text(render(record), encoding="utf-8")
    (folder / "report.json").write_text(to_json(asdict(record)), encoding="utf-8")
    (folder / "plan.json").write_text(to_json(asdict(record.recipe)), encoding="utf-8")


def read_record(folder: Path) -> RunRecord:
    """Reads the record of a run from its folder.

    Raises:
        LoadError: there is no `report.json`, or it is not one.
    """
    path = folder / "report.json"
    hint = "give a folder that `redpass optimize` wrote"
    try:
        return from_json(RunRecord, json.loads(path.read_bytes()))
    except OSError as error:
        raise LoadError("holds no report.json", file=folder, hint=hint) from error
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise LoadError(f"is not a report: {error}", file=path, hint=hint) from error


def to_json(data: Any) -> str:
    """Returns JSON text that every parser reads: what is not a finite number becomes null."""
    return json.dumps(_finite(data), indent=1, allow_nan=False) + "\n"


def _finite(data: Any) -> Any:
    if isinstance(data, dict):
        return {str(key): _finite(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data
