"""Running results: drop-in callables around a program or a file."""

from redpass.runtime.causal_lm import CausalLM
from redpass.runtime.onnx import OnnxModel

__all__ = ["CausalLM", "OnnxModel"]
