"""Data: rows that must not be in two splits, whatever their shapes and labels."""

from __future__ import annotations

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

import redpass
from redpass.data import Batches, Splits, refuse_short_rows, row_digests
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


def test_rows_of_less_than_two_tokens_are_refused_with_their_place() -> None:
    whole = torch.ones(2, 3, dtype=torch.int64)
    padded = whole.clone()
    padded[1, 1:] = 0
    good = {"input_ids": whole, "attention_mask": whole}
    short = {"input_ids": whole, "attention_mask": padded}
    refuse_short_rows(Batches((good, {"pixel_values": torch.ones(2, 3)})))
    with pytest.raises(DataError, match=r"a row of 1 token\(s\)") as caught:
        refuse_short_rows(Batches((good, short), "rows.npz"))
    assert caught.value.place == "batch 1, row 1"
    with pytest.raises(DataError, match=r"a row of 1 token\(s\)"):
        refuse_short_rows(Batches(({"input_ids": whole[:, :1]},)))


def test_a_language_model_is_not_optimised_on_rows_of_one_token() -> None:
    config = GPT2Config(vocab_size=32, n_positions=16, n_embd=16, n_layer=2, n_head=2)
    torch.manual_seed(0)
    program = redpass.load(GPT2LMHeadModel(config).eval())
    assert program.origin.task == "causal-lm"
    rows = [Batches(({"input_ids": torch.tensor([[n, n + 1]])},)) for n in range(3)]
    rows[0] = Batches(({"input_ids": torch.tensor([[7]])},))
    with pytest.raises(DataError, match="at least 2 are needed"):
        redpass.optimize(program, "drop_layers", budget="kl<=9", data=Splits(*rows))
