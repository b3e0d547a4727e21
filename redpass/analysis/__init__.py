"""Analyses: functions from a program to frozen facts. They never edit."""

from redpass.analysis.cost import Cost, cost
from redpass.analysis.inspection import Inspection, inspection
from redpass.analysis.structure import (
    Attention,
    Branch,
    CouplingGroup,
    Experts,
    FeedForward,
    Layer,
    Norm,
    Structure,
    structure,
)

__all__ = [
    "Attention",
    "Branch",
    "Cost",
    "CouplingGroup",
    "Experts",
    "FeedForward",
    "Inspection",
    "Layer",
    "Norm",
    "Structure",
    "cost",
    "inspection",
    "structure",
]
