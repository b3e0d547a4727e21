"""Distance between two sets of features, for metrics of generated samples."""

from __future__ import annotations

import torch
from torch import Tensor

from redpass.errors import DataError


def frechet_distance(left: Tensor, right: Tensor) -> float:
    """Returns the squared Fréchet distance of the Gaussians fitted to two sets of features.

    `|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2))`; the trace of the root is taken from the
    eigenvalues of the symmetric `C1^(1/2) C2 C1^(1/2)`, which are those of `C1 C2`.

    Args:
        left: `[samples, width]`, at least two samples; computed in float64.
        right: the same width, any number of samples from two.

    Raises:
        DataError: fewer than two samples, widths that differ, or NaN.

    Source: Heusel et al. 2017, arXiv:1706.08500.
    """
    for features in (left, right):
        if features.dim() != 2 or len(features) < 2 or features.shape[1] != left.shape[1]:
            raise DataError(
                f"features of shape {list(features.shape)} have no Fréchet distance",
                hint="give [samples, width], at least two samples, of one width",
            )
        if not bool(torch.isfinite(features).all()):
            raise DataError("features hold NaN or infinity")
    (mean, spread), (other_mean, other_spread) = map(_gaussian, (left, right))
    root = _square_root(spread)
    mixed = torch.linalg.eigvalsh(root @ other_spread @ root).clamp_min(0).sqrt().sum()
    shift = (mean - other_mean).square().sum()
    return float(shift + spread.trace() + other_spread.trace() - 2 * mixed)


def _gaussian(features: Tensor) -> tuple[Tensor, Tensor]:
    features = features.double()
    return features.mean(0), features.T.cov().reshape(features.shape[1], -1)


def _square_root(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    root: Tensor = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
    return root
