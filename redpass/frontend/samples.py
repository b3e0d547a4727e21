"""Random inputs that a program accepts: the generator that checking uses, for everyone."""

from redpass.verify.inputs import random_inputs

__all__ = ["random_inputs"]
