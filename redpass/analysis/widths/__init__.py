"""Widths of feed-forwards and convolutions: which can be narrower, what goes, and the edits."""
