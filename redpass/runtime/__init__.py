"""Running results: drop-in callables around a program or a file."""
