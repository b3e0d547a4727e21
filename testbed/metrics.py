"""Metrics of the diffusion model's samples, for any metric option: `testbed.metrics:recognised`.

    redpass.verify.metrics.find_metric("testbed.metrics:feature_distance")

A sample is drawn for each row of the data, of the row's class, from noise that depends on the row's
place alone; the test bed's vision transformer judges it.
"""

from functools import cache

import torch
from torch import Tensor, nn

from redpass.data import Batch
from redpass.program import Program
from redpass.verify.sampled import sample_accuracy, sample_distance
from testbed import diffusion, digits, loader, vision

STEPS = 20
SCALE = 2.0


def draw(program: Program, batch: Batch, number: int) -> tuple[Tensor, Tensor]:
    """Guided samples `[rows, 1, 8, 8]` of the batch's `class_labels`, and these labels."""
    labels = batch["class_labels"]
    images = diffusion.sample(predictor(program), labels, steps=STEPS, scale=SCALE, seed=number)
    return images, labels


def predictor(program: Program) -> diffusion.Denoiser:
    """The denoiser's program as a plain function of tensors."""
    return lambda noisy, timestep, labels: program(
        hidden_states=noisy, timestep=timestep, class_labels=labels
    )[0]


def classify(images: Tensor) -> Tensor:
    """Class scores `[rows, 10]` of digits `[rows, 1, 8, 8]`."""
    return vision.logits(_judge(), digits.enlarge(images))


def features(images: Tensor) -> Tensor:
    """What the vision transformer's head reads, `[rows, 64]`, of digits `[rows, 1, 8, 8]`."""
    with torch.no_grad():
        return _judge().vit(pixel_values=digits.enlarge(images)).last_hidden_state[:, 0]


@cache
def _judge() -> nn.Module:
    return loader.load("vit").module


@cache
def _real() -> Tensor:
    """Features of the training rows: 1097 real digits."""
    return features(digits.load("training").images)


recognised = sample_accuracy(draw, classify)
"""Share of samples that the vision transformer takes for the wanted digit."""

feature_distance = sample_distance(draw, features, _real)
"""Fréchet distance between features of the samples and of real digits."""
