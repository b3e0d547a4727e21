"""Tensors beside a journal: bit by bit as they were, or not there."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from redpass import kept_tensors
from redpass.blocks import JSON, Blocks

TENSORS = {
    "halves": torch.tensor([[0.0, -0.0, float("inf")], [float("nan"), 1e-7, -3.5]]).half(),
    "bfloat16": torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(0)).bfloat16(),
    "strided": torch.arange(12, dtype=torch.float64).reshape(3, 4).T,
    "booleans": torch.tensor([True, False]),
    "scalar": torch.tensor(7),
}


@pytest.fixture
def blocks(tmp_path: Path) -> Blocks:
    return Blocks(tmp_path / "values", "work")


def bits(tensor: Tensor) -> list[int]:
    return tensor.contiguous().reshape(-1).view(torch.uint8).tolist()


@pytest.mark.parametrize("name", TENSORS)
def test_a_tensor_comes_back_bit_by_bit_with_what_was_said(blocks: Blocks, name: str) -> None:
    tensor = TENSORS[name]
    kept_tensors.keep(blocks, name, tensor, [0.5, name])
    again = Blocks(blocks.path, "work", fresh=False)
    found = kept_tensors.find(again, name)
    assert found is not None
    assert found[1] == [0.5, name]
    assert (found[0].dtype, found[0].shape) == (tensor.dtype, tensor.shape)
    assert bits(found[0]) == bits(tensor)
    found[0].zero_()  # a value of one's own: the next reader sees what was kept
    assert bits(kept_tensors.find(again, name)[0]) == bits(tensor)


def test_without_a_file_or_under_another_name_there_is_none(blocks: Blocks) -> None:
    kept_tensors.keep(Blocks(), "a", TENSORS["scalar"])
    assert kept_tensors.find(Blocks(), "a") is None
    assert kept_tensors.find(blocks, "a") is None


@pytest.mark.parametrize(
    "form",
    [
        None,
        [],
        ["float32", [2]],
        ["float32", [3], None],
        ["no_type", [2], None],
        ["nn", [2], None],
        ["float32", 2.5, None],
        [7, [2], None],
    ],
)
def test_bytes_that_make_no_tensor_are_not_there(blocks: Blocks, form: JSON) -> None:
    blocks.keep("a", form, memoryview(bytes(8)))
    assert kept_tensors.find(blocks, "a") is None
