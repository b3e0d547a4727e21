"""Small trained models with real redundancy, to tell better rewrites from worse ones in minutes.

    model = testbed.load("gpt2")
    testbed.measure(model)                  # held-out perplexity
    testbed.measure(model, module=changed)  # the same figure for a changed copy

`python -m testbed.train` makes all the weights again from data that ships with installed packages.
"""

from testbed.errors import TestbedError
from testbed.loader import TestbedModel, load, names, stated_quality
from testbed.quality import measure
from testbed.splits import Split

__all__ = ["Split", "TestbedError", "TestbedModel", "load", "measure", "names", "stated_quality"]
