"""Fisher information predicts what an error in a linear's output does to the program's output."""

from __future__ import annotations

import torch
from torch import nn

import redpass
from redpass.analysis.ranks.fisher import fisher
from redpass.data import Batches, Splits
from redpass.facts import Facts
from redpass.program import Program, interpret


class _Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.head = nn.Linear(6, 16), nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"logits": self.head(torch.tanh(self.up(x)))}


def _rows(count: int) -> torch.Tensor:
    return torch.randn(count, 6, generator=torch.Generator().manual_seed(1))


def test_it_is_the_curvature_of_the_divergence() -> None:
    x = _rows(4000)
    program = redpass.load(
        _Classifier().eval(), example={"x": x[:3]}, inputs=["x:float32[batch,6]"]
    )
    found = fisher(program, Facts(program, Batches(({"x": x},))))
    noise = 0.05 * torch.randn(4000, 16, generator=torch.Generator().manual_seed(2))
    noise *= torch.logspace(0, -1, 16)
    first = next(iter(found))

    def disturb(node, value):
        return value + noise if node.name == first else value

    before = program(x)[0].log_softmax(-1)
    after = interpret(program, [x], disturb)[0].log_softmax(-1)
    divergence = float((before.exp() * (before - after)).sum(-1).mean())
    covariance = noise.double().T @ noise.double() / 4000
    predicted = 0.5 * float((found[first] * covariance).sum())
    assert 0.85 * divergence < predicted < 1.15 * divergence


def test_without_logits_it_is_the_share_of_the_output(
    residual: Program, residual_data: Splits
) -> None:
    data = residual_data.calibration
    found = fisher(residual, Facts(residual, data))
    last = list(found)[-1]
    size = torch.cat([residual(**batch)[0].flatten(0, 1) for batch in data]).square().sum(-1).mean()
    predicted = 0.5 * float(found[last].trace()) * 0.01
    assert 0.8 < predicted / (0.01 * 8 / float(size)) < 1.2
    assert not any(value.requires_grad for value in residual.weights.values())
