"""Analyses: functions from a program to frozen facts. They never edit."""

from redpass.analysis.cost import Cost, cost
from redpass.analysis.structure import Branch, Structure, structure

__all__ = ["Branch", "Cost", "Structure", "cost", "structure"]
