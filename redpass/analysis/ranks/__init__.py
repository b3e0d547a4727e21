"""Low rank: activation-whitened truncation, where it applies, and what ranks cost."""
