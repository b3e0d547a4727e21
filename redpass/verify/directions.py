"""Which way each metric is better: all that a budget's text needs to know, without PyTorch."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

BETTER: Mapping[str, str] = MappingProxyType(
    {
        "perplexity": "lower",
        "loss": "lower",
        "kl": "lower",
        "kl_p99": "lower",
        "top1": "higher",
        "accuracy": "higher",
        "cosine": "higher",
        "retrieval": "higher",
        "relative_error": "lower",
    }
)
"""Name of a metric in `metrics.METRICS` -> `lower` or `higher`."""
