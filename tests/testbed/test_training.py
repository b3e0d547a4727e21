"""Training is repeatable, resumes where it stopped, and gives the quality that the cards state."""

from dataclasses import replace

import pytest
import torch

import testbed
from testbed import cards, language, train, vision
from testbed.loop import Schedule, batch_rows, fit

SHORT = Schedule(cycles=(12,), batch=4, learning_rate=1e-2, warmup=3, seed=7)


def _loss(module, step):
    rows = batch_rows(40, SHORT, step)
    inputs = torch.linspace(-1, 1, 40).view(40, 1)[rows]
    return (module(inputs) - inputs.square()).square().mean()


def _module():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(1, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))


def test_the_learning_rate_rises_then_falls_to_nothing():
    rates = [SHORT.rate(step) for step in range(SHORT.steps + 1)]
    assert rates[2] == max(rates) == SHORT.learning_rate
    assert rates[0] == pytest.approx(SHORT.learning_rate / 3)
    assert rates[-1] == 0


def test_each_cycle_rises_and_falls_anew():
    twice = replace(SHORT, cycles=(12, 6))
    rates = [twice.rate(step) for step in range(twice.steps + 1)]
    assert twice.steps == 18
    assert rates[:12] == [SHORT.rate(step) for step in range(12)]
    assert rates[14] == max(rates[12:]) == SHORT.learning_rate
    assert rates[12] == pytest.approx(SHORT.learning_rate / 3)
    assert 0 < rates[17] < rates[16] < rates[15]
    assert rates[18] == 0


def test_a_card_tells_the_course_of_the_learning_rate():
    once = cards.course(SHORT)
    assert "rises to 0.01 over 3 steps, then falls linearly to zero" in once
    told = cards.course(replace(SHORT, cycles=(5, 7, 9)))
    assert told.endswith("3 times: in cycles of 5, 7 and 9 steps.")


def test_a_model_trained_to_another_quality_is_a_miss(monkeypatch, capsys):
    def train_worse(_name, work):
        assert work.is_dir()
        assert work != train.WORK
        return train.loader.load("cnn").module, train.Spent(1.0, 1.0)

    monkeypatch.setattr(train, "_train", train_worse)
    stated = testbed.stated_quality("cnn")["reporting"]
    train_and_exit = pytest.raises(SystemExit)
    with train_and_exit as same:
        train.main(["--check", "cnn"])
    assert not same.value.code
    monkeypatch.setattr(train.quality, "measure", lambda *_, **__: stated * 0.97)
    with train_and_exit as missed:
        train.main(["--check", "cnn"])
    assert missed.value.code == "not reproduced: cnn"
    assert "(-3.00%)" in capsys.readouterr().out


def test_an_epoch_visits_each_row_once():
    rows = torch.cat([batch_rows(40, SHORT, step) for step in range(10)])
    assert sorted(rows.tolist()) == list(range(40))
    assert not torch.equal(batch_rows(40, SHORT, 10), batch_rows(40, SHORT, 0))


def test_a_resumed_run_equals_an_unbroken_one(tmp_path, monkeypatch):
    unbroken, broken = _module(), _module()
    monkeypatch.setattr("testbed.loop.SAVE_EVERY", 5)
    fit(unbroken, _loss, SHORT, tmp_path / "unbroken.pt")

    def interrupted(module, step):
        if step == 7:
            raise KeyboardInterrupt
        return _loss(module, step)

    with pytest.raises(KeyboardInterrupt):
        fit(broken, interrupted, SHORT, tmp_path / "broken.pt")
    again = _module()
    fit(again, _loss, SHORT, tmp_path / "broken.pt")
    for one, other in zip(unbroken.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)


def test_an_unknown_name_is_refused(capsys):
    with pytest.raises(SystemExit):
        train.main(["gpt5"])
    assert "unknown model gpt5; there are gpt2," in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("name", vision.RECIPES)
def test_training_a_classifier_again_reaches_the_stated_quality(name):
    assert train.check(name)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", language.RECIPES.values(), ids=lambda recipe: recipe.name)
def test_a_language_model_learns_the_same_way_twice(recipe, tmp_path):
    short = replace(recipe, schedule=replace(recipe.schedule, cycles=(25,), warmup=5))
    first, _ = language.train(short, tmp_path / "first")
    second, _ = language.train(short, tmp_path / "second")
    for one, other in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(one, other)
    rows = language.training_rows()[:4]
    with torch.no_grad():
        assert first(input_ids=rows, labels=rows).loss < 7
