"""Loading and tracing: from a module, folder or file to a `Program`, and data to batches."""

from redpass.frontend.batches import complete_inputs, read_batches
from redpass.frontend.load import load
from redpass.frontend.samples import random_inputs
from redpass.frontend.trace import NaNWeightsWarning

__all__ = ["NaNWeightsWarning", "complete_inputs", "load", "random_inputs", "read_batches"]
