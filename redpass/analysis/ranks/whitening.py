"""Activation-whitened truncation of linear maps: the best rank-`r` stand-in on given inputs.

For `y = W x` with `G = E[x xᵀ]`, the matrix `W'` of rank `r` with the least `E || W x - W' x ||²`
is the truncation of `W S`, `S Sᵀ = G`, taken back through `S`. Its left singular vectors `U` are
the eigenvectors of `W G Wᵀ`, and

    W' = U_r U_rᵀ W,    E || W x - W' x ||² = sum of the eigenvalues behind the first r

so neither `S` nor its inverse is ever formed: a Gram matrix that is singular (few tokens, dead
channels) is as good as any other. `U_r` is orthonormal, so `U_rᵀ y` gives back the latent value.

    moments = found.moments(linear.input, linear.input)           # analysis.statistics.collect
    cut = decompose(linear.matrix(program), moments.gram / moments.tokens)
    up, down = cut.factors(32)          # W ~ up @ down, [outs, 32] and [32, ins], float64
    cut.errors[32]                      # E || W x - W' x ||² of rank 32; errors[0] = E || y ||²

A matrix with more rows than columns is first brought to a triangle (QR), so the eigenproblem is
always that of the smaller side, and the orthonormal basis is formed for the rank asked for only.
A part of a map (the rows of some heads) is decomposed by giving these rows: `matrix[rows]`.

Source: SVD-LLM (Wang et al. 2024, arXiv:2403.07378) for truncation in the whitened space; the
form over `W G Wᵀ` is its algebra without the Cholesky factor, as in principal components of `y`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from redpass.errors import DataError, UsageError

ROWS = 512
"""Rows of a matrix that are multiplied at once, so that no second copy of it is made."""

EXACT = 1e-12
"""Share of the squared output that counts as rounding: float32 weights carry about 1e-14."""


@dataclass(frozen=True, eq=False)
class Decomposition:
    """A linear map in the directions of its output that matter most, the first one most.

    Attributes:
        matrix: `[outs, ins]`, as given.
        vectors: orthonormal columns `[k, k]`, float64, `k = min(outs, ins)`: the directions, in
            the outputs themselves or, where `reflectors` are, in the basis these stand for.
        energies: `[k]`, float64, falling: the squared output in each direction, per token; the
            squared singular values of `W S`.
        reflectors: a basis of the outputs as `torch.geqrf` gives it, when `outs > ins`.
    """

    matrix: Tensor
    vectors: Tensor
    energies: Tensor
    reflectors: tuple[Tensor, Tensor] | None = None

    @cached_property
    def errors(self) -> Tensor:
        """`[k + 1]`, float64: the expected squared error per token of each rank, 0 to `k`."""
        tail = self.energies.flip(0).cumsum(0).flip(0)
        return torch.cat([tail, tail.new_zeros(1)])

    @property
    def total(self) -> float:
        """The expected squared output per token."""
        return float(self.errors[0])

    def rank(self, tolerance: float = EXACT) -> int:
        """Returns the least rank that loses at most `tolerance` of the squared output."""
        return int((self.errors > tolerance * self.total).sum())

    def left(self, rank: int) -> Tensor:
        """Returns the first directions as orthonormal columns `[outs, rank]`, float64."""
        check_rank(rank, self.matrix.shape)
        kept = self.vectors[:, :rank]
        if self.reflectors is None:
            return kept
        padded = torch.nn.functional.pad(kept, (0, 0, 0, len(self.matrix) - len(kept)))
        return torch.ormqr(*self.reflectors, padded)

    def factors(self, rank: int) -> tuple[Tensor, Tensor]:
        """Returns `(up, down)`, `[outs, rank]` and `[rank, ins]`, float64: `W' = up @ down`.

        `up` has orthonormal columns.

        Raises:
            UsageError: a rank below one or above the smaller side.
        """
        up = self.left(rank)
        down = torch.empty(rank, self.matrix.shape[1], dtype=torch.float64)
        for columns in _pieces(self.matrix.shape[1]):
            down[:, columns] = up.T @ self.matrix[:, columns].double()
        return up, down


def check_rank(rank: int, shape: tuple[int, ...], place: str = "") -> None:
    """Raises `UsageError` when no matrix `[outs, ins]` of this shape can have that rank."""
    full = min(shape)
    if not 1 <= rank <= full:
        raise UsageError(
            f"a matrix of {shape[0]} x {shape[1]} cannot be cut to rank {rank}",
            place=place or None,
            hint=f"give a rank from 1 to {full}",
        )


def decompose(matrix: Tensor, gram: Tensor | None = None) -> Decomposition:
    """Decomposes a linear map for inputs of a given Gram matrix.

    Time is that of one symmetric eigenproblem of the smaller side and `outs * ins²` operations
    for the Gram matrix. Beside its result and what was given, memory holds at most two more
    matrices of the map's size in float64.

    Args:
        matrix: `[outs, ins]`, any floating type.
        gram: `E[x xᵀ]` `[ins, ins]`, symmetric up to rounding, of any rank; None for plain
            truncation of the matrix, which is what inputs of one variance would give.

    Raises:
        UsageError: shapes that do not fit, or values that are no floating point numbers.
        DataError: NaN or infinite values.
    """
    _check(matrix, gram)
    outs, ins = matrix.shape
    if outs > ins:
        packed, scales = torch.geqrf(matrix.double())
        directions = _directions(packed[:ins].triu(), gram)
        return Decomposition(matrix, *directions, (packed, scales))
    return Decomposition(matrix, *_directions(matrix, gram))


def centred(gram: Tensor, mean: Tensor) -> Tensor:
    """Returns the covariance `[n, n]` of inputs with `E[x xᵀ] = gram` and `E[x] = mean`.

    A map with a bias may lose what the mean alone would need: its bias takes that over,
    `b' = b + (W - W') mean`.
    """
    return gram - torch.outer(mean, mean)


def shrunk(gram: Tensor, tokens: int, towards: Tensor | None = None) -> Tensor:
    """Returns the Gram matrix drawn towards another one, the more the fewer tokens it is from.

    With few tokens most directions were never seen, which does not mean that they never occur.
    Oracle-approximating shrinkage needs no further data and vanishes with many tokens.

    Args:
        towards: what is expected without data, up to a factor; None for equal channels.

    Source: Chen, Wiesel, Eldar and Hero 2010, IEEE Trans. Signal Processing 58(10), equation 23.
    """
    size = len(gram)
    trace, square = float(gram.trace()), float(gram.square().sum())
    apart = (tokens + 1 - 2 / size) * (square - trace**2 / size)
    weight = 1.0 if apart <= 0 else min(1.0, ((1 - 2 / size) * square + trace**2) / apart)
    found = (1 - weight) * gram
    if towards is None or not float(towards.trace()) > 0:
        found.diagonal().add_(weight * trace / size)
        return found
    found += towards * (weight * trace / float(towards.trace()))
    return found


def _directions(matrix: Tensor, gram: Tensor | None) -> tuple[Tensor, Tensor]:
    """Eigenvectors and eigenvalues of `W G Wᵀ`, falling."""
    outs = len(matrix)
    product = torch.empty(outs, outs, dtype=torch.float64)
    for rows in _pieces(outs):
        part = matrix[rows].double()
        part = part if gram is None else part @ gram.double()
        for others in _pieces(rows.stop):  # the lower triangle is all that `eigh` reads
            product[rows, others] = part @ matrix[others].double().T
    energies, vectors = torch.linalg.eigh(product)
    return vectors.flip(1), energies.flip(0).clamp_min(0.0)


def _pieces(size: int) -> list[slice]:
    return [slice(start, min(start + ROWS, size)) for start in range(0, size, ROWS)]


def _check(matrix: Tensor, gram: Tensor | None) -> None:
    if matrix.dim() != 2 or not matrix.is_floating_point() or not matrix.numel():
        raise UsageError(f"no matrix to decompose: {list(matrix.shape)} of {matrix.dtype}")
    if gram is not None and tuple(gram.shape) != (matrix.shape[1], matrix.shape[1]):
        found = " x ".join(map(str, gram.shape))
        raise UsageError(f"a Gram matrix of {found} for a map that reads {matrix.shape[1]} values")
    for what, value in (("weight", matrix), ("Gram matrix", gram)):
        if value is not None and not _is_finite(value):
            raise DataError(f"a {what} to decompose holds NaN or infinite values")


def _is_finite(value: Tensor) -> bool:
    """Whether all values are finite, without a second matrix to tell."""
    return all(bool(torch.isfinite(extreme)) for extreme in torch.aminmax(value))
