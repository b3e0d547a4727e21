"""Where in a graph each `redpass::` op could stand: one file a pattern, found from data flow."""

from __future__ import annotations

from redpass.codegen.patterns import (
    add_norm,
    clustered_attention,
    gated_feed_forward,
    latent_attention,
    low_rank_linear,
    rotary,
)
from redpass.codegen.patterns.site import Finder, Site

PATTERNS: tuple[Finder, ...] = (
    latent_attention.find,
    clustered_attention.find,
    gated_feed_forward.find,
    low_rank_linear.find,
    rotary.find,
    add_norm.find,
)
"""In the order in which they choose their nodes: a node belongs to one place."""

__all__ = ["PATTERNS", "Finder", "Site"]
