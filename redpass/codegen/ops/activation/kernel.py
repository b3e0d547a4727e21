"""Activations on float32 tiles. No libdevice: the interpreter has none."""

import triton
import triton.language as tl


@triton.jit
def tanh(x):
    """Hyperbolic tangent. The sigmoid saturates where the tangent does, so nothing overflows."""
    return 2.0 * tl.sigmoid(2.0 * x) - 1.0


@triton.jit
def activate(x, NAME: tl.constexpr):
    """Returns the activation called `NAME` of a float32 tile."""
    if NAME == "relu":
        # Not `maximum`, which would turn a NaN into 0 and so hide it.
        x = tl.where(x < 0.0, 0.0, x)
    elif NAME == "silu":
        x = x * tl.sigmoid(x)
    elif NAME == "sigmoid":
        x = tl.sigmoid(x)
    elif NAME == "tanh":
        x = tanh(x)
    elif NAME == "gelu":
        x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif NAME == "gelu_tanh":
        x = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    else:
        tl.static_assert(NAME == "none")
    return x
