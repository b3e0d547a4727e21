"""Loading and tracing: from a module, folder or file to a `Program`, and data to batches."""

from redpass.frontend.load import load
from redpass.frontend.samples import random_inputs

__all__ = ["load", "random_inputs"]
