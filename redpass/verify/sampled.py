"""Metrics of what a generative program makes: samples are drawn, then judged by another model.

    recognised = sample_accuracy(draw, classify)
    distance = sample_distance(draw, features, reference)

Each returns a metric function as users write them, `(program, original, batches)`, to be put in a
module under a name: `package.module:recognised` is then found like any other metric. `draw` makes
one sample for each row of the data, from the row and a fixed seed, so two programs are compared
on the same noise.
"""

from __future__ import annotations

from collections.abc import Callable
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from redpass.data import Batch, Batches
from redpass.program import Program
from redpass.verify.distance import frechet_distance
from redpass.verify.estimate import Estimate
from redpass.verify.user_metric import UserFunction

Draw = Callable[[Program, Batch, int], tuple[Tensor, Tensor]]
"""Program, batch and the batch's number to samples `[rows, ...]` and wanted classes `[rows]`."""
Classify = Callable[[Tensor], Tensor]
"""Samples `[rows, ...]` to class scores `[rows, classes]`."""
Features = Callable[[Tensor], Tensor]
"""Samples `[rows, ...]` to features `[rows, width]`."""

GROUPS = 10
"""How many parts of the samples are left out in turn for the standard error of a distance."""


def sample_accuracy(draw: Draw, classify: Classify) -> UserFunction:
    """Returns the metric "share of samples that the classifier takes for the wanted class".

    It gives one number a sample (1 or 0, NaN where the scores hold NaN), so programs are compared
    in pairs.
    """

    def accuracy(program: Program, original: Program, batches: Batches) -> Tensor:
        del original
        hits = []
        for number, batch in enumerate(batches):
            samples, wanted = _drawn(draw, program, batch, number)
            scores = classify(samples)
            right = (scores.argmax(-1) == wanted).double()
            hits.append(torch.where(scores.isnan().any(-1), torch.nan, right))
        return torch.cat(hits)

    return marked(accuracy, "higher", 1)


def sample_distance(
    draw: Draw, features: Features, reference: Callable[[], Tensor] | None = None
) -> UserFunction:
    """Returns the metric "Fréchet distance between features of samples and of a reference".

    Args:
        reference: gives the features of real data, `[any, width]`; None takes the original
            program's samples, whose own distance is then 0.

    Source: Heusel et al. 2017, arXiv:1706.08500. The standard error is that of a jackknife over
    ten groups of samples.
    """
    kept: WeakKeyDictionary[Program, tuple[Batches, Tensor]] = WeakKeyDictionary()

    def of_original(original: Program, batches: Batches) -> Tensor:
        known = kept.get(original)
        if known is None or known[0] is not batches:
            known = kept[original] = (batches, _features(draw, features, original, batches))
        return known[1]

    def distance(program: Program, original: Program, batches: Batches) -> Estimate:
        was = of_original(original, batches)
        now = was if program is original else _features(draw, features, program, batches)
        return _estimate(now, was, reference() if reference else was)

    return marked(distance, "lower", 2)


def marked(function: UserFunction, better: str, least: int) -> UserFunction:
    """Returns `function` with its direction and the fewest rows it can be measured on."""
    function.better = better  # type: ignore[attr-defined]
    function.least = least  # type: ignore[attr-defined]
    return function


def _features(draw: Draw, features: Features, program: Program, batches: Batches) -> Tensor:
    drawn = (_drawn(draw, program, batch, number)[0] for number, batch in enumerate(batches))
    return torch.cat([features(samples) for samples in drawn])


def _drawn(draw: Draw, program: Program, batch: Batch, number: int) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        return draw(program, batch, number)


def _estimate(now: Tensor, was: Tensor, known: Tensor) -> Estimate:
    """Both distances and their difference, with the errors of a jackknife over paired samples."""
    value, original = frechet_distance(now, known), frechet_distance(was, known)
    error = gap_error = torch.nan
    if len(now) >= 2 * GROUPS:
        left = torch.tensor([_without(group, now, known) for group in range(GROUPS)])
        old = torch.tensor([_without(group, was, known) for group in range(GROUPS)])
        error, gap_error = _jackknife(left), _jackknife(left - old)
    return Estimate(value, error, len(now), original, value - original, gap_error)


def _without(group: int, features: Tensor, known: Tensor) -> float:
    rows = torch.arange(len(features)) % GROUPS != group
    return frechet_distance(features[rows], known)


def _jackknife(left_out: Tensor) -> float:
    return ((GROUPS - 1) * left_out.var(correction=0)).sqrt().item()
