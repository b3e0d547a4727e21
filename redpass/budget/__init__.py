"""Budgets: what may be lost, what must be saved, and the search between the two."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from redpass.budget.spec import Budget, Goal, Limit, parse_budget

if TYPE_CHECKING:
    from redpass.budget.shares import Chosen, choose

__all__ = ["Budget", "Chosen", "Goal", "Limit", "choose", "parse_budget"]


def __getattr__(name: str) -> Any:
    """Imports the search at its first use: a budget's text is read without PyTorch."""
    if name not in ("Chosen", "choose"):
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    from redpass.budget import shares

    return getattr(shares, name)
