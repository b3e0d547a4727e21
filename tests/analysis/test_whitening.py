"""Truncation is checked against the full SVD of `W S`, on Gram matrices of every rank."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from redpass.analysis.ranks.whitening import Decomposition, centred, decompose
from redpass.errors import DataError, UsageError


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _inputs(tokens: int, width: int, seed: int = 0, dead: int = 0) -> Tensor:
    """Rows whose channels differ in size and depend on each other; `dead` of them are zero."""
    x = _random(tokens, width, seed=seed) @ _random(width, width, seed=seed + 1)
    x = x * torch.logspace(0, -3, width, dtype=torch.float64)
    x[:, width - dead :] = 0.0
    return x


def _error(matrix: Tensor, cut: Tensor, x: Tensor) -> float:
    return float((x @ (matrix - cut).T).square().sum() / len(x))


def _best(matrix: Tensor, x: Tensor, rank: int) -> float:
    """What no matrix of this rank can beat (Eckart and Young, for the outputs)."""
    values = torch.linalg.svdvals(x @ matrix.T / len(x) ** 0.5)
    return float(values[rank:].square().sum())


def _cut(found: Decomposition, rank: int) -> Tensor:
    up, down = found.factors(rank)
    return up @ down


@given(
    outs=st.integers(1, 24),
    ins=st.integers(1, 24),
    tokens=st.integers(1, 40),
    dead=st.integers(0, 5),
    seed=st.integers(0, 100),
)
def test_every_rank_reaches_the_least_error_there_is(
    outs: int, ins: int, tokens: int, dead: int, seed: int
) -> None:
    matrix, x = _random(outs, ins, seed=seed), _inputs(tokens, ins, seed, min(dead, ins - 1))
    found = decompose(matrix, x.T @ x / tokens)
    whole = _error(matrix, 0 * matrix, x)
    for rank in range(1, min(outs, ins) + 1):
        error = _error(matrix, _cut(found, rank), x)
        assert error == pytest.approx(_best(matrix, x, rank), abs=1e-9 * whole)
        assert float(found.errors[rank]) == pytest.approx(error, abs=1e-9 * whole)


@pytest.mark.parametrize("shape", [(20, 12), (12, 20), (16, 16)])
def test_full_rank_leaves_the_matrix_as_it_is(shape: tuple[int, int]) -> None:
    matrix = _random(*shape)
    x = _inputs(50, shape[1])
    cut = _cut(decompose(matrix, x.T @ x / 50), min(shape))
    assert torch.allclose(cut, matrix, rtol=0, atol=1e-10)


@pytest.mark.parametrize("shape", [(24, 12), (12, 24)])
def test_a_planted_rank_is_found_and_costs_nothing(shape: tuple[int, int]) -> None:
    matrix = (_random(shape[0], 5) @ _random(5, shape[1], seed=1)).float()
    x = _random(200, shape[1], seed=2)
    found = decompose(matrix, x.T @ x / 200)
    assert found.rank() == 5
    assert torch.allclose(_cut(found, 5), matrix.double(), rtol=0, atol=2e-6)


def test_directions_the_data_never_show_are_kept_as_the_matrix_has_them() -> None:
    """Few tokens: what is kept is `U Uᵀ W`, never something blown up by an inverse."""
    matrix, x = _random(30, 40), _random(3, 40, seed=1)
    found = decompose(matrix, x.T @ x / 3)
    assert found.rank() == 3
    cut = _cut(found, 3)
    assert float(cut.norm()) <= float(matrix.norm())
    assert _error(matrix, cut, x) < 1e-10 * _error(matrix, 0 * matrix, x)


def test_whitened_beats_plain_on_correlated_inputs_and_equals_it_on_white_ones() -> None:
    matrix, x = _random(20, 30), _inputs(500, 30)
    plain, whitened = decompose(matrix), decompose(matrix, x.T @ x / 500)
    assert _error(matrix, _cut(whitened, 6), x) < 0.2 * _error(matrix, _cut(plain, 6), x)
    white = decompose(matrix, torch.eye(30, dtype=torch.float64))
    assert torch.allclose(_cut(white, 6), _cut(plain, 6), atol=1e-9)
    values = torch.linalg.svdvals(matrix).square()
    assert torch.allclose(plain.energies, values, atol=1e-9)


def test_a_covariance_leaves_the_mean_to_the_bias() -> None:
    matrix, x = _random(10, 16), _inputs(300, 16) + 5.0
    gram, mean = x.T @ x / 300, x.mean(0)
    cut = _cut(decompose(matrix, centred(gram, mean)), 4)
    offset = (matrix - cut) @ mean
    moved = float((x @ (matrix - cut).T - offset).square().sum() / 300)
    assert moved < _error(matrix, _cut(decompose(matrix, gram), 4), x)


def test_a_dead_map_has_rank_zero_and_can_still_be_cut() -> None:
    found = decompose(_random(6, 8), torch.zeros(8, 8, dtype=torch.float64))
    assert (found.total, found.rank()) == (0.0, 0)
    up, down = found.factors(1)
    assert (up.shape, down.shape) == ((6, 1), (1, 8))


@pytest.mark.parametrize("rank", [0, -1, 7])
def test_ranks_that_no_matrix_has_are_refused(rank: int) -> None:
    with pytest.raises(UsageError, match="rank from 1 to 6"):
        decompose(_random(6, 8)).factors(rank)


def test_what_is_no_matrix_is_refused() -> None:
    with pytest.raises(UsageError, match="no matrix"):
        decompose(torch.zeros(4))
    with pytest.raises(UsageError, match="no matrix"):
        decompose(torch.zeros(4, 4, dtype=torch.int8))
    with pytest.raises(UsageError, match="Gram matrix of 3 x 3"):
        decompose(torch.zeros(4, 4), torch.zeros(3, 3))
    with pytest.raises(DataError, match="Gram matrix"):
        decompose(torch.ones(2, 2), torch.full((2, 2), torch.nan))
