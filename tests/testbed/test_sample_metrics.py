"""The diffusion model's samples, judged by metrics that any option that takes a metric can name."""

from dataclasses import replace

import pytest
import torch

import testbed
from benchmarks.leaderboard import SPECS, batches
from redpass.errors import UsageError
from redpass.frontend import load
from redpass.verify.metrics import evaluate, find_metric

ROWS = 20


@pytest.fixture(scope="module")
def dit():
    model = testbed.load("dit")
    split = model.splits["choosing"]
    example = dict(split.part(slice(2)).inputs)
    program = load(model.module, example=example, inputs=SPECS["dit"])
    return program, batches(program, split.part(slice(ROWS)), ROWS)


@pytest.fixture(scope="module")
def worse(dit):
    """The program with noise on its weights: its samples are no digits any more."""
    program, _ = dit
    generator = torch.Generator().manual_seed(0)
    noisy = {
        name: value * (1 + 0.7 * torch.randn(value.shape, generator=generator))
        if value.is_floating_point() and value.dim() == 2
        else value
        for name, value in program.weights.items()
    }
    return replace(program, weights=noisy)


def test_samples_are_recognised_and_those_of_a_worse_model_less(dit, worse):
    program, data = dit
    metric = find_metric("testbed.metrics:recognised")
    found = evaluate(metric, worse, program, data)
    assert metric.better == "higher"
    assert found.original >= 0.8
    assert found.value <= found.original - 0.2
    assert found.count == ROWS


def test_features_of_samples_are_near_those_of_digits_and_a_worse_models_are_not(dit, worse):
    program, data = dit
    metric = find_metric("testbed.metrics:feature_distance")
    found = evaluate(metric, worse, program, data)
    assert metric.better == "lower"
    assert 0 < found.original < found.value
    assert found.difference > 2 * found.difference_stderr


def test_a_name_that_the_module_has_not_is_told_with_the_nearest():
    with pytest.raises(UsageError, match=r"holds no function 'recognized'\n  did you mean"):
        find_metric("testbed.metrics:recognized")
