"""Each translation, run in ONNX Runtime against the program it came from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as nnf
from torch import Tensor

from redpass.export import to_onnx
from redpass.export.onnx import build
from redpass.export.translate import TABLE
from tests.export.conftest import program_of


def floats(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


X = {"x": floats(3, 4, 6)}
XY = {"x": floats(3, 4, 6), "y": floats(3, 4, 6, seed=1)}
WHOLE = {"x": torch.arange(-9, 9).view(3, 6)}
IMAGE = {"x": floats(2, 4, 9, 9)}
VECTOR, MATRIX = floats(6, seed=2), floats(6, 5, seed=3)
KERNEL, THIN, LINE = floats(8, 4, 3, 3), floats(4, 1, 3, 3), floats(5, 4, 3)
STEPS = torch.tensor([2, 0, 1])

CASES: dict[str, tuple[Callable[..., Any], dict[str, Tensor]]] = {
    "unary": (lambda x: (x.exp(), x.abs().sqrt(), -x, x.sin(), x.cos(), x.tanh(), x.sigmoid()), X),
    "rounding": (lambda x: (x.floor(), x.ceil(), x.round(), x.sign(), torch.erf(x)), X),
    "activations": (
        lambda x: (nnf.silu(x), nnf.gelu(x), nnf.gelu(x, approximate="tanh"), nnf.relu(x),
                   nnf.softplus(x), nnf.mish(x), nnf.hardswish(x)),
        X,
    ),
    "arithmetic": (
        lambda x, y: (x + 2 * y, torch.add(x, y, alpha=3), x - y, 1 - x, x * y, x / (y.abs() + 1)),
        XY,
    ),
    "powers": (lambda x: (x**2, x.abs() ** 0.5, x.abs() ** 1.5, 2.0**x, torch.rsqrt(x * x + 1)), X),
    "whole divisions": (lambda x: (x // 4, x % 4, torch.div(x, 4, rounding_mode="trunc")), WHOLE),
    "mixed types": (
        lambda x, n: (x * n, n + 1.5, n > 0.5, x < n),
        {**X, "n": torch.arange(18).view(3, 1, 6)},
    ),
    "comparisons": (lambda x, y: (x < y, x <= y, x > 0, x >= y, x == x, x != y), XY),
    "logic": (lambda x, y: ((x > 0) & (y > 0), (x > 0) | (y > 0), ~(x > 0), (x > 0) ^ (y > 0)), XY),
    "choices": (
        lambda x, y: (torch.where(x > 0, x, y), torch.where(x > 0, x, 0.0),
                      x.masked_fill(y > 0, -1e9), x.clamp(-0.5, 0.5), x.clamp(min=0.1),
                      torch.maximum(x, y), torch.minimum(x, y)),
        XY,
    ),
    "whole clamp": (lambda x: x.clamp(-2, 3), WHOLE),
    "casts": (
        lambda x: (x.to(torch.int64), x.to(torch.bool), x.to(torch.float64), (x > 0).float()),
        X,
    ),
    "reductions": (
        lambda x: (x.mean(-1), x.sum((1, 2)), x.amax(1, keepdim=True), x.amin(-1), x.sum(),
                   torch.logsumexp(x, -1), (x > 1).any(-1), (x > -1).all(1)),
        X,
    ),
    "extremes": (lambda x: (*x.max(-1), *x.min(1), x.max(), x.argmax(-1), x.argmin(1)), X),
    "softmaxes": (lambda x: (x.softmax(-1), x.log_softmax(1)), X),
    "running sum": (lambda x: (x.cumsum(-1), (x > 0).long().cumsum(1)), X),
    "rankings": (lambda x: (*x.topk(3), *x.sort(-1, descending=True), *x.sort(1)), X),
    "views": (
        lambda x: (x.view(-1, 24), x.reshape(x.shape[0], 2, 12), x.flatten(1), x.unsqueeze(1),
                   x[:, None].squeeze(1), x.unflatten(2, (2, 3))),
        X,
    ),
    "orders": (
        lambda x: (x.transpose(1, 2), x.permute(2, 0, 1), x.transpose(1, 2).transpose(0, 1)),
        X,
    ),
    "expansions": (
        lambda x: (x[:, :1].expand(-1, 5, -1), x.repeat(1, 2, 3), x.repeat_interleave(2, 1)),
        X,
    ),
    "slices": (
        lambda x: (x[:, 1:3], x[..., ::2], x[:, -1], x[:, :, 2:], x.narrow(1, 1, 2), x[1:]),
        X,
    ),
    "joins": (lambda x, y: (torch.cat([x, y], -1), torch.stack([x, y], 1), torch.cat([x, y])), XY),
    "parts": (lambda x: (*x.split(2, -1), *x.split([1, 3], 1), *x.chunk(2, -1), *x.unbind(1)), X),
    "moves": (
        lambda x: (x.roll(1, 1), x.roll((1, -1), (1, 2)), x.flip(1), nnf.pad(x, (1, 2), value=3.0)),
        X,
    ),
    "gathers": (
        lambda x, n: (x.gather(1, n), x.index_select(1, STEPS), x[:, STEPS], VECTOR[n % 6]),
        {**X, "n": torch.zeros(3, 2, 6, dtype=torch.int64)},
    ),
    "pairs of places": (lambda x, n: x[n % 3, n % 4], {**X, "n": torch.tensor([2, 0, 1])}),
    "counted places": (
        lambda x: x[torch.arange(x.shape[0])[:, None], torch.arange(x.shape[1])[None, :]],
        {"x": floats(3, 4)},
    ),
    "fills": (
        lambda x: (x + torch.zeros(x.shape[0], 1, 1), torch.full_like(x, 2.5), x.new_ones(2),
                   torch.arange(x.shape[0]), torch.arange(1, 9, 2) + x.shape[0]),
        X,
    ),
    "triangles": (lambda x: (x.tril(), x.triu(1)), X),
    "products": (
        lambda x, y: (x @ y.transpose(1, 2), torch.bmm(x, y.mT), x @ MATRIX,
                      nnf.linear(x, MATRIX.T),
                      torch.einsum("bij,bkj->bik", x, y)),
        XY,
    ),
    "addmm": (lambda x: torch.addmm(VECTOR[:5], x.view(-1, 6), MATRIX).view(*x.shape[:2], 5), X),
    "norms": (
        lambda x: (nnf.layer_norm(x, [6], VECTOR, VECTOR), nnf.layer_norm(x, [4, 6]),
                   nnf.rms_norm(x, [6], VECTOR, 1e-6)),
        X,
    ),
    "convolutions": (
        lambda x: (nnf.conv2d(x, KERNEL, VECTOR.repeat(2)[:8], 2, 1),
                   nnf.conv2d(x, THIN, groups=4, dilation=2)),
        IMAGE,
    ),
    "one axis": (lambda x: nnf.conv1d(x, LINE, padding=1), X),
    "pools": (
        lambda x: (nnf.max_pool2d(x, 2), nnf.max_pool2d(x, 3, 2, 1), nnf.avg_pool2d(x, 2),
                   nnf.adaptive_avg_pool2d(x, 1)),
        IMAGE,
    ),
    "image norms": (
        lambda x: (nnf.group_norm(x, 2, VECTOR[:4], VECTOR[:4]),
                   nnf.batch_norm(x, VECTOR[:4], VECTOR[:4].abs() + 1, VECTOR[:4], VECTOR[:4])),
        IMAGE,
    ),
    "scatter": (lambda n: torch.zeros(3, dtype=torch.int64).index_put((n % 3,), torch.arange(3)),
                {"n": torch.tensor([2, 0, 1])}),
    "counts": (lambda n: torch.histc(n.float(), 6, 0, 5), {"n": torch.tensor([2, 0, 1, 2])}),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_each_translation_gives_the_programs_results_at_other_sizes(
    name: str, tmp_path: Path
) -> None:
    function, example = CASES[name]
    fixed = name in ("scatter", "pairs of places")
    dims = {key: tuple(value.shape) for key, value in example.items()} if fixed else None
    report = to_onnx(program_of(function, example, dims), tmp_path / "model.onnx")
    assert max(report.worst.values()) <= 1


@pytest.mark.parametrize("name", CASES)
def test_each_case_is_translated_here_and_not_by_the_generic_way(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> Any:
        raise AssertionError("took the generic way")

    monkeypatch.setattr("redpass.export.onnx.translate_generic", refuse)
    function, example = CASES[name]
    assert len(list(build(program_of(function, example)).graph))


def test_a_wrong_translation_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from redpass.errors import ExportError

    monkeypatch.setitem(TABLE, "tanh", TABLE["sigmoid"])
    program = program_of(lambda x: {"y": x.tanh()}, X)
    with pytest.raises(ExportError, match=r"gives other results than the program: output 'y'"):
        to_onnx(program, tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())
