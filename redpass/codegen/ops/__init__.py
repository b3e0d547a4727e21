"""The `redpass::` ops: what rewrites need and ATen does not have, each with a Triton kernel.

One folder per op; `op.py` says what is in it. Nothing is registered by importing: call `register`.
Everything works without Triton and without a GPU; the references run then.
"""

from __future__ import annotations

from redpass.codegen.ops import (
    add_norm,
    clustered_attention,
    dispatch,
    gated_feed_forward,
    latent_attention,
    low_rank_linear,
    rotary,
)
from redpass.codegen.ops.dispatch import KernelWarning, use_configs_of
from redpass.codegen.ops.op import Config, Op, register_ops
from redpass.program import RUN_FORMS

_ALL = (
    add_norm,
    rotary,
    gated_feed_forward,
    low_rank_linear,
    clustered_attention,
    latent_attention,
)

OPS: dict[str, Op] = {folder.OP.name: folder.OP for folder in _ALL}
"""All ops by name."""


def register() -> None:
    """Makes `torch.ops.redpass.<name>` of every op known to PyTorch. May be called again.

    Programs then run without them where their weights are on a CPU.
    """
    from redpass.codegen.decompose import as_run

    register_ops(OPS, dispatch.run)
    if as_run not in RUN_FORMS:
        RUN_FORMS.append(as_run)


__all__ = ["OPS", "Config", "KernelWarning", "Op", "register", "use_configs_of"]
