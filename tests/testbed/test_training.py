"""Training is repeatable, resumes where it stopped, and gives the quality that the cards state."""

from dataclasses import replace

import pytest
import torch

from testbed import digits, language, train, vision
from testbed.loop import Schedule, batch_rows, fit
from testbed.quality import accuracy
from testbed.splits import Split

SHORT = Schedule(steps=12, batch=4, learning_rate=1e-2, warmup=3, seed=7)


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
@pytest.mark.parametrize("recipe", vision.RECIPES.values(), ids=lambda recipe: recipe.name)
def test_training_a_classifier_again_reaches_the_stated_quality(recipe, tmp_path):
    module, _ = vision.train(recipe, tmp_path)
    data = digits.load("reporting")
    images = digits.enlarge(data.images) if recipe.enlarged else data.images
    with torch.no_grad():
        assert accuracy(module, Split({"pixel_values": images}, data.labels)) > 0.97


@pytest.mark.slow
@pytest.mark.parametrize("recipe", language.RECIPES.values(), ids=lambda recipe: recipe.name)
def test_a_language_model_learns_the_same_way_twice(recipe, tmp_path):
    short = replace(recipe, schedule=replace(recipe.schedule, steps=25, warmup=5))
    first, _ = language.train(short, tmp_path / "first")
    second, _ = language.train(short, tmp_path / "second")
    for one, other in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(one, other)
    rows = language.training_rows()[:4]
    with torch.no_grad():
        assert first(input_ids=rows, labels=rows).loss < 7
