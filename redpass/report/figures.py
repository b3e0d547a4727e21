"""Figures as people read them: `22.7 M`, `90.9 MB`, `-18.2%`."""

from __future__ import annotations

import math
from typing import TypeGuard

UNITS = ("", "K", "M", "G", "T", "P")
NONE = "—"


def count(value: float | None) -> str:
    """Returns a count with three digits and a decimal unit: `22.7 M`."""
    return _scaled(value, "").rstrip()


def size(value: float | None) -> str:
    """Returns a number of bytes in decimal units: `90.9 MB`."""
    return _scaled(value, "B")


def plain(value: float | None, digits: int = 4) -> str:
    """Returns a number with `digits` significant digits."""
    return NONE if not _is_number(value) else f"{value:.{digits}g}"


def change(before: float | None, after: float | None) -> str:
    """Returns a relative change in percent: `-18.2%`, `0%` when nothing changed."""
    if not _is_number(before) or not _is_number(after) or before == 0:
        return NONE
    share = 100 * (after - before) / abs(before)
    if share == 0:
        return "0%"
    return f"{share:+.1f}%" if abs(share) >= 0.05 else f"{share:+.1g}%"


def error(value: float | None) -> str:
    """Returns a standard error for use after a figure: ` ± 0.0012`, or nothing."""
    return f" ± {value:.2g}" if _is_number(value) and value else ""


def seconds(value: float) -> str:
    """Returns a duration: `380 ms`, `12.3 s`, `4 min 10 s`."""
    if value < 1:
        return f"{value * 1000:.0f} ms"
    if value < 60:
        return f"{value:.1f} s"
    return whole_seconds(value)


def whole_seconds(value: float) -> str:
    """Returns a duration without fractions of seconds: `9 s`, `4 min 10 s`."""
    minutes, rest = divmod(round(value), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def milliseconds(value: float | None) -> str:
    """Returns a latency given in milliseconds: `3.42 ms`."""
    return NONE if not _is_number(value) else f"{value:.3g} ms"


def _scaled(value: float | None, unit: str) -> str:
    if not _is_number(value):
        return NONE
    amount = float(value)
    for prefix in UNITS:
        if abs(amount) < 999.5 or prefix == UNITS[-1]:
            digits = 0 if not prefix or abs(amount) >= 99.95 else 1 if abs(amount) >= 9.995 else 2
            return f"{amount:.{digits}f} {prefix}{unit}"
        amount /= 1000
    raise AssertionError("the last unit takes every amount")


def _is_number(value: float | None) -> TypeGuard[float]:
    return value is not None and math.isfinite(value)
