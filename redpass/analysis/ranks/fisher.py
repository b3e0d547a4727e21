"""`fisher`: how much an error in the output of each linear matters for what the program returns.

For a small error `e` in the output `y` of a linear, the output distribution moves by

    KL = 1/2 E[eᵀ F e],    F = E[g gᵀ],    g = d(-log p(t)) / d y,    t drawn from the program's p

`F` is the Fisher information of that output, `[outs, outs]`, from one forward and one backward run
over the data: `g` is drawn once a token. Where the output is no logits, `p` is a normal
distribution around it, scaled so that `1/2 E[eᵀ F e]` is the squared error of the output as a
share of its square. Errors of different tokens are taken to be independent.

Source: Fisher information as the measure for compression is that of Hsu et al. 2022
(arXiv:2207.00112) and Palu (Chang et al. 2024, arXiv:2407.21118); here of outputs, not of weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from redpass.analysis.linears import linears
from redpass.analysis.tokens import Tokens
from redpass.data import Batch
from redpass.errors import DataError
from redpass.facts import Facts
from redpass.program import Program, interpret
from redpass.progress import Silent, track
from redpass.verify.inputs import complete
from redpass.verify.originals import quality_port

SEED = 20
"""Of the targets that are drawn."""


def fisher(program: Program, facts: Facts) -> Mapping[str, Tensor]:
    """Returns node -> `F` per token, float64, for every linear that the output depends on.

    Memory holds one batch's run with all that its backward run needs.

    Raises:
        DataError: no calibration data, or gradients that are NaN or infinite.
    """
    data, nodes = facts.data(), facts.get(linears).by_node
    run = _Run(program, frozenset(nodes))
    for batch in track(data, Silent(), "Fisher information", len(data)):
        run.add(batch)
    return {name: total / run.tokens[name] for name, total in run.totals.items()}


class _Run:
    def __init__(self, program: Program, nodes: frozenset[str]) -> None:
        self.program, self.nodes = program, nodes
        self.rows = Tokens(program)
        self.chance = torch.Generator().manual_seed(SEED)
        self.port = quality_port(program)
        self.totals: dict[str, Tensor] = {}
        self.tokens: dict[str, int] = {}

    def add(self, batch: Batch) -> None:
        """Adds the gradients of one batch."""
        inputs = complete(self.program, batch)
        names = [port.name for port in self.program.signature.inputs]
        seen: dict[str, Tensor] = {}

        def watch(node: fx.Node, value: Any) -> Any:
            if node.name in self.nodes:
                value = value if value.requires_grad else value.detach().requires_grad_()
                seen[node.name] = value
            return value

        given = [inputs[name] for name in names]
        outputs = interpret(self.program, given, watch, gradients=True)
        places = [port.name for port in self.program.signature.outputs]
        out = dict(zip(places, outputs, strict=True))[self.port.name]
        wanted = list(seen)
        found = torch.autograd.grad(
            out, [seen[name] for name in wanted], self._gradient(out.detach()), allow_unused=True
        )
        for name, gradient in zip(wanted, found, strict=True):
            if gradient is not None:
                self._sum(name, gradient, inputs)

    def _gradient(self, out: Tensor) -> Tensor:
        """`d(-log p(t)) / d out` for targets drawn from the output."""
        if self.port.name == "logits":
            share = out.double().softmax(-1)
            flat = share.flatten(0, -2)
            drawn = torch.multinomial(flat, 1, generator=self.chance)
            flat = flat.scatter_add(-1, drawn, -torch.ones_like(flat[:, :1]))
            return flat.reshape(out.shape).to(out.dtype)
        signs = torch.randint(0, 2, out.shape, generator=self.chance).mul(2).sub(1)
        size = out.double().square().sum() / max(out[..., 0].numel(), 1)
        return signs.to(out.dtype) * float((2 / size.clamp_min(1e-30)).sqrt())

    def _sum(self, name: str, gradient: Tensor, inputs: Mapping[str, Tensor]) -> None:
        rows = self.rows.rows(name, gradient, inputs).double()
        if not bool(torch.isfinite(rows).all()):
            raise DataError("its gradients on the calibration data are NaN or infinite", place=name)
        zero = torch.zeros(rows.shape[1], rows.shape[1], dtype=torch.float64)
        self.totals[name] = self.totals.get(name, zero) + rows.T @ rows
        self.tokens[name] = self.tokens.get(name, 0) + len(rows)
