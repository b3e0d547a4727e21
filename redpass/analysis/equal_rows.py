"""`EqualRows`: which units have the same weights, or the same up to a factor."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from redpass.analysis.channels import ANY, EXACT


class EqualRows:
    """Rows of several matrices, one a unit; units are equal where all their rows are.

    Rows that may be rescaled are divided by their norm, so what is left is equal where they are
    equal up to a factor.

    Args:
        count: how many units there are.

    Attributes:
        scales: what the rows of each unit were divided by, `[count]`, float64.
    """

    def __init__(self, count: int) -> None:
        self.rows: list[Tensor] = []
        self.slack: list[float] = []
        self.scales = torch.ones(count, dtype=torch.float64)

    def add(self, rows: Tensor, free: str, eps: float) -> None:
        """Adds one row a unit.

        Args:
            rows: `[count, n]`, float64.
            free: one of `channels.FREEDOMS`: which factors rows may differ by.
            eps: of the type that the rows came in; factors leave two roundings.
        """
        if free != EXACT:
            scale = rows.norm(dim=1)
            largest = rows.gather(1, rows.abs().argmax(1, keepdim=True)).flatten()
            scale = scale * largest.sign() if free == ANY else scale
            scale = torch.where(scale == 0, 1.0, scale)
            rows, self.scales = rows / scale[:, None], self.scales * scale
        self.rows.append(rows)
        self.slack.append(0.0 if free == EXACT else 2 * eps)

    def pairs(self) -> dict[int, int]:
        """Returns unit -> the first unit equal to it, for all that have one before them."""
        generator = torch.Generator().manual_seed(0)
        places = torch.zeros_like(self.scales)
        for rows in self.rows:
            direction = torch.randn(rows.shape[1], generator=generator, dtype=rows.dtype)
            places += rows @ direction / direction.norm()
        window = 1e-12 + 4 * max(self.slack)
        return dict(self._neighbours(places, window))

    def _neighbours(self, places: Tensor, window: float) -> Iterator[tuple[int, int]]:
        """Compares each unit with the kept ones whose projection is within `window`."""
        kept: list[int] = []
        values = places.tolist()
        for index in sorted(range(len(values)), key=lambda i: (values[i], i)):
            kept = [k for k in kept if values[index] - values[k] <= window]
            same = next((k for k in kept if self._is_same(index, k)), None)
            if same is None:
                kept.append(index)
            else:
                yield index, same

    def _is_same(self, left: int, right: int) -> bool:
        return all(
            float((rows[left] - rows[right]).abs().max()) <= slack
            for rows, slack in zip(self.rows, self.slack, strict=True)
        )
