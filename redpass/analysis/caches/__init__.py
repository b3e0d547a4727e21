"""Caches of keys and values: where they stand, what to keep of them, and graphs that keep less."""
