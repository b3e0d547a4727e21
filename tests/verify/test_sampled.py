"""Metrics of samples: a denoiser judged by a classifier and by the features of what it makes."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from redpass.data import Batch, Batches
from redpass.errors import DataError
from redpass.program import Program
from redpass.verify.distance import frechet_distance
from redpass.verify.metrics import Metric, evaluate
from redpass.verify.sampled import sample_accuracy, sample_distance

ROWS = 30


def draw(program: Program, batch: Batch, number: int) -> tuple[Tensor, Tensor]:
    """A "sample" is the program's output on noise of a fixed seed; 0 to 3 is wanted in turn."""
    rows = len(batch["x"])
    noise = torch.randn(rows, 6, generator=torch.Generator().manual_seed(number))
    return program(x=noise)[0], torch.arange(rows) % 4


def metric(function: object) -> Metric:
    return Metric("test:m", function.better, "", least=function.least, function=function)  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def data() -> Batches:
    return Batches(tuple({"x": torch.zeros(ROWS // 2, 6)} for _ in range(2)), "rows")


def features(samples: Tensor) -> Tensor:
    return samples[:, :3]


def all_features(program: Program, data: Batches) -> Tensor:
    return torch.cat([draw(program, batch, i)[0] for i, batch in enumerate(data)])[:, :3]


def test_accuracy_on_samples(classes: Program, changed_classes: Program, data: Batches) -> None:
    one = metric(sample_accuracy(draw, lambda samples: samples))
    one.check(classes, data)
    found = evaluate(one, changed_classes, classes, data)
    hits = [
        float(scores.argmax() == wanted)
        for number, batch in enumerate(data)
        for scores, wanted in zip(*draw(changed_classes, batch, number), strict=True)
    ]
    assert found.value == pytest.approx(sum(hits) / ROWS, abs=1e-12)
    assert 0 < found.value < 1
    assert (one.better, found.count) == ("higher", ROWS)
    p = found.value
    assert found.stderr == pytest.approx(math.sqrt(p * (1 - p) / (ROWS - 1)), rel=1e-9)


def test_scores_that_are_nan_are_an_error(classes: Program, data: Batches) -> None:
    one = metric(sample_accuracy(draw, lambda samples: samples * torch.nan))
    with pytest.raises(DataError, match="metric 'test:m': returned NaN"):
        one.check(classes, data)


def test_distance_to_the_originals_samples(
    classes: Program, changed_classes: Program, data: Batches
) -> None:
    one = metric(sample_distance(draw, features))
    found = evaluate(one, changed_classes, classes, data)
    slow = frechet_distance(all_features(changed_classes, data), all_features(classes, data))
    assert found.value == found.difference == pytest.approx(slow, rel=1e-9)
    assert found.value > 0
    assert (one.better, found.count) == ("lower", ROWS)
    itself = evaluate(one, classes, classes, data)
    assert itself.value == pytest.approx(0, abs=1e-9)
    assert itself.difference_stderr == pytest.approx(0, abs=1e-9)


def test_distance_to_real_features(
    classes: Program, changed_classes: Program, data: Batches
) -> None:
    real = torch.randn(200, 3, generator=torch.Generator().manual_seed(3))
    one = metric(sample_distance(draw, features, lambda: real))
    found = evaluate(one, changed_classes, classes, data)
    before = frechet_distance(all_features(classes, data), real)
    assert found.value == pytest.approx(frechet_distance(all_features(changed_classes, data), real))
    assert found.original == pytest.approx(before)
    assert found.difference == pytest.approx(found.value - before)
    assert 0 < found.difference_stderr < found.stderr + abs(found.difference)


def test_the_jackknife_says_how_far_distances_of_other_draws_lie(classes: Program) -> None:
    real = torch.randn(500, 3, generator=torch.Generator().manual_seed(3))
    rows = Batches(({"x": torch.zeros(200, 6)},))

    def of(seed: int) -> Metric:
        return metric(sample_distance(lambda p, b, _: draw(p, b, seed), features, lambda: real))

    found = [evaluate(of(seed), classes, classes, rows) for seed in range(25)]
    values = torch.tensor([estimate.value for estimate in found])
    errors = torch.tensor([estimate.stderr for estimate in found])
    assert errors.mean() == pytest.approx(values.std().item(), rel=0.5)


def test_few_samples_have_no_error_and_one_has_no_distance(classes: Program) -> None:
    one = metric(sample_distance(draw, features))
    three = Batches(({"x": torch.zeros(3, 6)},))
    assert math.isnan(evaluate(one, classes, classes, three).stderr)
    with pytest.raises(DataError, match="1 rows are too few for metric 'test:m'"):
        one.check(classes, Batches(({"x": torch.zeros(1, 6)},)))


def test_a_check_takes_as_many_batches_as_the_metric_needs(classes: Program) -> None:
    one = metric(sample_distance(draw, features))
    one.check(classes, Batches(tuple({"x": torch.zeros(1, 6)} for _ in range(9))))
