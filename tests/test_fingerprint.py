"""Fingerprints tell programs with the same graph apart by their weights."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent / "passes"))
from test_depth_passes import tower

from redpass.fingerprint import SAMPLE, fingerprint


def test_the_same_program_built_again_has_the_same_one():
    assert fingerprint(tower(2)) == fingerprint(tower(2))
    assert fingerprint(tower(2)) != fingerprint(tower(3))


@pytest.mark.parametrize("place", [0, 1, 5, -1])
def test_one_number_of_one_weight_counts(place):
    program = tower(2)
    for size in (6, 10 * SAMPLE + 3):
        weight = torch.randn(size, 4, generator=torch.Generator().manual_seed(0))
        other = weight.clone()
        other.view(-1)[place] += 1e-3
        pair = [replace(program, weights={**program.weights, "up0": w}) for w in (weight, other)]
        assert fingerprint(pair[0]) != fingerprint(pair[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int64, torch.bool, torch.complex64])
def test_weights_of_every_kind_have_one(dtype):
    program = tower(2)
    values = [torch.tensor([0, 1, 0]).to(dtype), torch.tensor([0, 1, 1]).to(dtype)]
    pair = [replace(program, weights={**program.weights, "up0": w}) for w in values]
    assert fingerprint(pair[0]) != fingerprint(pair[1])


def test_weights_without_numbers_are_told_by_their_form():
    program = tower(2)
    weights = [torch.empty(0, 4), torch.empty(3, 4, device="meta"), torch.full((3, 4), torch.nan)]
    found = {fingerprint(replace(program, weights={"up0": w})) for w in weights}
    assert len(found) == 3
