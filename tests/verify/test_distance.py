import pytest
import scipy.linalg
import torch

from redpass.errors import DataError
from redpass.verify.distance import frechet_distance

FEATURES = torch.randn(500, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_equal_features_are_at_distance_zero() -> None:
    assert frechet_distance(FEATURES, FEATURES) == pytest.approx(0, abs=1e-10)


def test_a_shift_counts_squared() -> None:
    assert frechet_distance(FEATURES, FEATURES + 3) == pytest.approx(5 * 9, rel=1e-9)


def test_a_scale_counts_by_the_spread() -> None:
    centred = FEATURES - FEATURES.mean(0)
    wanted = centred.T.cov().trace().item() * (1 - 1.5) ** 2
    assert frechet_distance(centred, 1.5 * centred) == pytest.approx(wanted, rel=1e-9)


def test_equals_the_root_of_the_product() -> None:
    other = torch.randn(300, 5, dtype=torch.float64) @ torch.randn(5, 5, dtype=torch.float64)
    first, second = FEATURES.T.cov(), other.T.cov()
    root = scipy.linalg.sqrtm((first @ second).numpy()).real.trace()
    shift = (FEATURES.mean(0) - other.mean(0)).square().sum()
    wanted = (shift + first.trace() + second.trace()).item() - 2 * root
    assert frechet_distance(FEATURES, other) == pytest.approx(wanted, rel=1e-8)


def test_one_feature() -> None:
    left, right = torch.tensor([[1.0], [3.0]]), torch.tensor([[0.0], [0.0]])
    assert frechet_distance(left, right) == pytest.approx(2**2 + 2)


@pytest.mark.parametrize("bad", [torch.zeros(1, 5), torch.zeros(4, 3), torch.zeros(5)])
def test_features_that_do_not_fit(bad: torch.Tensor) -> None:
    with pytest.raises(DataError, match="have no Fréchet distance"):
        frechet_distance(FEATURES, bad)
    with pytest.raises(DataError, match="NaN"):
        frechet_distance(FEATURES, torch.full((3, 5), torch.nan))
