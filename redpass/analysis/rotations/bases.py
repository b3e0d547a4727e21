"""Coordinates of a stream: which directions stay, the matrices in and out, the fit behind a norm.

With `V` `[d, k]` orthonormal directions and `F` `[k, k]` orthogonal, the stream `x` becomes

    y = x R,   R = sqrt(k / d) V F             what is left of it is  x' = y (d / k) Rᵀ

and `mean(y²)` over `k` features is `mean(x'²)` over `d`: an RMS norm of `y` divides by the same
number, with the same eps, and its result is turned back by the same matrix. For layer norms one of
the directions is the mean over features, and `F` takes it to the mean over the `k`: then means and
variances agree as well. So norms stay as they are; only gains and biases move, into what reads.

Behind a norm the loss is not the end: with `u` the normed value and `z = u V` what is left of it,

    argmin over D of || u - z (Vᵀ + D) ||² + strength * || D ||²

is what the readers read in place of `u`. It tells the lost directions from those that stay, at each
norm anew, though the rotation is one for all.

Source: SliceGPT (Ashkboos et al. 2024, arXiv:2401.15024) turns each block by its own principal
components, which costs a product in every skip, and centres what is written for layer norms.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from redpass.analysis.ridge import Sums, best_fit


@dataclass(frozen=True)
class Basis:
    """Directions that stay.

    Attributes:
        directions: `V` `[d, k]`, orthonormal columns; float64.
        frame: `F` `[k, k]`, orthogonal.
    """

    directions: Tensor
    frame: Tensor

    @property
    def width(self) -> int:
        """How many features are left."""
        return int(self.directions.shape[1])

    @property
    def scale(self) -> float:
        """`sqrt(k / d)`."""
        return float((self.width / self.directions.shape[0]) ** 0.5)

    @property
    def inwards(self) -> Tensor:
        """`R` `[d, k]`."""
        return self.scale * self.directions @ self.frame

    @property
    def outwards(self) -> Tensor:
        """The way back, `[d, k]`: `x' = y outwardsᵀ`."""
        return self.directions @ self.frame / self.scale


@dataclass(frozen=True)
class Fit:
    """What readers behind a norm read in place of its normed value.

    Attributes:
        matrix: `[d, k]`: the normed value is about `matrix` times the norm's result now, ...
        shift: ... plus this, `[d]`.
        error: squared share of the normed value that is off, on batches not fitted on.
        unrepaired: the same without the fit.
    """

    matrix: Tensor
    shift: Tensor
    error: float
    unrepaired: float


def basis(directions: Tensor, *, has_mean: bool) -> Basis:
    """Completes directions `[d, k]` (`[d, k - 1]` at right angles to the mean, with `has_mean`)."""
    directions = directions.double()
    if not has_mean:
        return Basis(directions, torch.eye(directions.shape[1], dtype=torch.float64))
    size = directions.shape[0]
    mean = torch.full((size, 1), size**-0.5, dtype=torch.float64)
    whole = torch.cat([directions, mean], dim=1)
    return Basis(whole, _frame(whole.shape[1]))


def _frame(size: int) -> Tensor:
    """An orthogonal matrix whose last row is constant (Helmert's)."""
    rows = torch.zeros(size, size, dtype=torch.float64)
    for i in range(1, size):
        rows[i - 1, :i] = (i * (i + 1)) ** -0.5
        rows[i - 1, i] = -i * (i * (i + 1)) ** -0.5
    rows[-1] = size**-0.5
    return rows


def principal(gram: Tensor, *, has_mean: bool) -> Tensor:
    """Principal directions of a Gram matrix `[d, d]`, largest first; `d - 1` with `has_mean`."""
    size = len(gram)
    if has_mean:  # the mean comes last, whatever else the data has nothing of
        gram = gram - gram.mean(0, keepdim=True)
        gram = gram - gram.mean(1, keepdim=True)
        gram = gram - gram.diagonal().sum().clamp_min(1e-30) * 2 / size
    found: Tensor = torch.linalg.eigh((gram + gram.T) / 2)[1].flip(1)
    return found[:, : size - 1] if has_mean else found


def channels(gram: Tensor, count: int, *, has_mean: bool) -> Tensor:
    """The span of the `count` features of largest energy: a control that turns nothing."""
    size = len(gram)
    kept = gram.diagonal().argsort(descending=True)[:count].sort()[0]
    units = torch.eye(size, dtype=torch.float64)[:, kept]
    if not has_mean:
        return units
    found: Tensor = torch.linalg.qr(units - 1 / size)[0]
    return found


def plain(turned: Basis) -> Fit:
    """What readers read without a fit: what is left, turned back."""
    zero = torch.zeros(turned.directions.shape[0], dtype=torch.float64)
    return Fit(turned.outwards, zero, 0.0, 0.0)


def fitted(turned: Basis, fit: Tensor, held: Tensor | None, *, refit: bool, shift: bool) -> Fit:
    """Fits what is read behind one norm.

    Args:
        fit: `[u 1]ᵀ[u 1]` over tokens of one part of the batches, `[d + 1, d + 1]`.
        held: the same over the other part; None where there is one batch only.
        refit: whether to fit at all; without, only errors are told.
        shift: whether a constant may be added.
    """
    parts = [_sums(turned, gram, shift) for gram in (fit, fit if held is None else held)]
    bare = plain(turned)
    unrepaired = (parts[0] + parts[1]).error(None)
    found = best_fit(parts, has_bias=shift) if refit else None
    if found is None or not found.gains:
        return Fit(bare.matrix, bare.shift, unrepaired, unrepaired)
    change, error = found.change, max(found.after, 0.0)
    whole = fit if held is None else fit + held
    width = turned.width
    v = turned.directions
    # A norm divides by the length of what is left: its result is longer than `z` by that much.
    longer = (float(whole[:-1, :-1].trace()) / _energy(v, whole)) ** 0.5
    matrix = (v + change[:width].T) @ turned.frame / (turned.scale * longer)
    constant = change[width] if shift else bare.shift
    return Fit(matrix, constant, error, unrepaired)


def _energy(directions: Tensor, gram: Tensor) -> float:
    inner = gram[:-1, :-1]
    return max(float((directions * (inner @ directions)).sum()), 1e-30)


def _sums(turned: Basis, gram: Tensor, shift: bool) -> Sums:
    """What a fit of the lost part on what is left needs, from the moments of the whole."""
    v, inner = turned.directions, gram[:-1, :-1]
    features = v
    if shift:
        features = torch.zeros(len(gram), turned.width + 1, dtype=torch.float64)
        features[:-1, :-1], features[-1, -1] = v, 1.0
    inner_or_all = gram if shift else inner
    moved = inner_or_all @ features
    found = Sums(features.shape[1], len(v))
    found.gram = features.T @ moved
    cross = moved[: len(v)].T  # [features, d]: zᵀu, and the sum of u
    found.cross = cross - (cross @ v) @ v.T
    found.size = float(inner.trace())
    found.square = max(found.size - _energy(v, gram), 0.0)
    return found
