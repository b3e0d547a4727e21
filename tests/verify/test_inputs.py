import pytest
import torch
from models import VOCABULARY

from redpass.errors import DataError
from redpass.program import Program
from redpass.verify.inputs import check_inputs, complete, random_inputs
from redpass.verify.sizes import concrete


def test_token_ids_stay_below_the_vocabulary(masked: Program) -> None:
    values = random_inputs(masked, {"batch": 40, "seq": 50})
    assert values["input_ids"].shape == (40, 50)
    assert values["input_ids"].unique().tolist() == list(range(VOCABULARY))
    assert (values["attention_mask"] == 1).all()


def test_seeds(masked: Program) -> None:
    torch.manual_seed(3)
    state = torch.random.get_rng_state()
    first, again, other = (random_inputs(masked, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first["input_ids"], again["input_ids"])
    assert not torch.equal(first["input_ids"], other["input_ids"])
    assert torch.equal(torch.random.get_rng_state(), state)


def test_check_inputs_vary_sizes_and_padding(masked: Program) -> None:
    rounds = check_inputs(masked)
    assert [tuple(r["input_ids"].shape) for r in rounds] == [(3, 5), (1, 1), (3, 17), (1, 29)]
    right, _, left, _ = (r["attention_mask"] for r in rounds)
    assert right.tolist() == [[1, 1, 1, 1, 0], [1] * 5, [1, 1, 1, 1, 0]]
    assert left[0].tolist() == [0] * 5 + [1] * 12
    assert left[1].tolist() == [1] * 17
    for values in rounds:
        masked(**values)


def test_check_inputs_stay_within_a_table_of_positions(position: Program) -> None:
    rounds = check_inputs(position)
    assert max(values["input_ids"].shape[1] for values in rounds) == 6
    for values in rounds:
        position(**values)


def test_complete_makes_up_what_a_batch_leaves_out(masked: Program) -> None:
    ids = torch.tensor([[1, 2, 3]], dtype=torch.int32)
    values = complete(masked, {"input_ids": ids, "labels": torch.tensor([1])})
    assert list(values) == ["input_ids", "attention_mask"]
    assert values["input_ids"].dtype == torch.int64
    assert values["attention_mask"].tolist() == [[1, 1, 1]]


def test_complete_names_what_it_cannot_make_up(masked: Program) -> None:
    with pytest.raises(DataError, match=r"^input 'input_ids': the batches do not hold"):
        complete(masked, {"attention_mask": torch.ones(1, 3, dtype=torch.int64)})


def test_sizes_from_expressions() -> None:
    sizes = {"past": 3, "seq": 5}
    assert concrete((2, "past + seq", "(seq - 1)//2 + 1", "2*seq"), sizes) == (2, 8, 3, 10)
