"""Experts that are another one in disguise."""

import copy

import torch

from testbed.planted import models
from testbed.planted.record import Finding, Planted, tokens


def permuted_experts() -> Planted:
    """A Mixtral layer whose expert 3 is expert 1 with its inner neurons in another order.

    Weights differ entry by entry, so only an alignment of neurons shows it. The router still tells
    the two apart, so the reduced model keeps both places and lets them share one set of weights.
    """
    module = models.mixtral(seed=20)
    experts = module.model.layers[1].mlp.experts
    order = torch.randperm(48, generator=torch.Generator().manual_seed(20))
    gate, up = experts.gate_up_proj[1].chunk(2)
    experts.gate_up_proj[3] = torch.cat([gate[order], up[order]])
    experts.down_proj[3] = experts.down_proj[1][:, order]
    reduced = copy.deepcopy(module)
    shared = reduced.model.layers[1].mlp.experts
    shared.gate_up_proj[3] = shared.gate_up_proj[1]
    shared.down_proj[3] = shared.down_proj[1]
    where = ("model.layers.1.mlp.experts",)
    finding = Finding("equal experts", where, {"pairs": ((1, 3),), "order": tuple(order.tolist())})
    return Planted("permuted_experts", module, tokens(), (finding,), "within tolerance", reduced)
