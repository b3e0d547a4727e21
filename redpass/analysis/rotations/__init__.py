"""Residual streams in other coordinates: where they stand, which directions matter, the edits."""
