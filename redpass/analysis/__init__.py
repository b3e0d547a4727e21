"""Analyses: functions from a program to frozen facts. They never edit."""

from redpass.analysis.angular_distance import AngularDistance, angular_distance
from redpass.analysis.block_influence import BlockInfluence, block_influence
from redpass.analysis.branch_entropy import BranchEntropy, branch_entropy
from redpass.analysis.cka import Cka, cka
from redpass.analysis.cost import Cost, cost
from redpass.analysis.inspection import Inspection, inspection
from redpass.analysis.macro_influence import MacroInfluence, macro_influence
from redpass.analysis.similarity import Similarity, similarity
from redpass.analysis.stream_statistics import StreamStatistics, stream_statistics
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
    "AngularDistance",
    "Attention",
    "BlockInfluence",
    "Branch",
    "BranchEntropy",
    "Cka",
    "Cost",
    "CouplingGroup",
    "Experts",
    "FeedForward",
    "Inspection",
    "Layer",
    "MacroInfluence",
    "Norm",
    "Similarity",
    "StreamStatistics",
    "Structure",
    "angular_distance",
    "block_influence",
    "branch_entropy",
    "cka",
    "cost",
    "inspection",
    "macro_influence",
    "similarity",
    "stream_statistics",
    "structure",
]
