"""Data: rows that must not be in two splits, whatever their shapes and labels."""

from __future__ import annotations

import pytest
import torch

from redpass.data import Batches, Splits, row_digests
from redpass.errors import DataError


def rows(*numbers: int, label: int = 0) -> Batches:
    """Rows with an image, a time step of no axes of its own, and a label."""
    wanted = torch.tensor(numbers)
    image = wanted.float().view(-1, 1, 1, 1).expand(-1, 1, 2, 2)
    labels = torch.full_like(wanted, label)
    return Batches(({"x": image, "timestep": wanted, "labels": labels},), f"rows {numbers}")


def test_a_row_in_two_splits_is_refused() -> None:
    Splits(rows(1, 2), rows(3), rows(4, 5))
    with pytest.raises(DataError, match="the same row is in 'calibration' and 'reporting'"):
        Splits(rows(1, 2), rows(3), rows(4, 2))


def test_another_label_does_not_make_it_another_row() -> None:
    with pytest.raises(DataError, match="the same row is in 'choosing' and 'reporting'"):
        Splits(rows(1), rows(2), rows(2, label=7))


def test_a_row_differs_by_any_of_its_inputs() -> None:
    batch = dict(rows(1, 1)[0])
    first, second = row_digests(batch)
    assert first == second
    batch["timestep"] = torch.tensor([1, 2])
    first, second = row_digests(batch)
    assert first != second
