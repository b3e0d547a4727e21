"""Budgets: what may be lost, what must be saved, and the search between the two."""

from redpass.budget.shares import Chosen, choose
from redpass.budget.spec import Budget, Goal, Limit, parse_budget

__all__ = ["Budget", "Chosen", "Goal", "Limit", "choose", "parse_budget"]
