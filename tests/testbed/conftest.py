"""Lets the tests import the test bed, which is run from a checkout and never installed."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
